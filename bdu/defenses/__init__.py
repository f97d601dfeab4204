"""Defences, one file each; ``protocol.py`` says what they are given and give back."""
