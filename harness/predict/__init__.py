"""Predict a sweep on a card that is not here."""
