"""Studies: what runs show, drawn and tabled."""
