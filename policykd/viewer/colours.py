"""Colours of the policies, the same in films, pictures and reports."""

# Blue, amber and grey stay distinguishable with red-green colour blindness.
TEACHER = "#3b82f6"
STUDENT = "#f59e0b"

# Background, raised parts, text and secondary text of a film. Text on PAPER has a contrast above 4.5 (WCAG 2.2, AA).
PAPER = "#0f172a"
PANEL = "#1e293b"
INK = "#f1f5f9"
FAINT = "#94a3b8"
