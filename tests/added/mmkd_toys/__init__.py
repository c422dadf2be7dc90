"""What an installed package adds to mmkd: one method of each kind."""
