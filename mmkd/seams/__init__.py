"""Every private or undocumented touch of another package, each one named function, held by a contract test."""
