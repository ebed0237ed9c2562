"""The web page that shows a cluster or a node live, and the JSON that it draws."""

from cairn.serve.dashboard.board import Board
from cairn.serve.dashboard.pages import PAGE, STATE, page_files, since_of
from cairn.serve.dashboard.traffic import Traffic

__all__ = ["PAGE", "STATE", "Board", "Traffic", "page_files", "since_of"]
