"""Regresses the responses on the layers of a frozen network, or on the pixels, exactly."""
