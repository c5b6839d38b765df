"""What a run shows: tables, figures, the HTML page, the model card."""
