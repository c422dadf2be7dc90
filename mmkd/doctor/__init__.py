"""`mmkd doctor`: whether the run of a recipe would be sound, before anything is spent."""

from .report import doctor as doctor
