"""The command line: ``upipe`` (main.py) and the tables it prints (render.py)."""
