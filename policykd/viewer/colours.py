"""The colours in which policies are drawn, everywhere the same: films, pictures and reports."""

TEACHER, STUDENT, RANDOM = "#3b82f6", "#f59e0b", "#94a3b8"
"""blue, amber and grey: told apart by eyes that do not tell red from green"""
PAPER, PANEL, INK, FAINT = "#0f172a", "#1e293b", "#f1f5f9", "#94a3b8"
"""of a film: background, its raised parts, text, lesser text; text on either background has a contrast above 5"""
