"""The controller without a switch: its rules run on a software switch."""
