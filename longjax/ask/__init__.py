"""Questions of a person at a terminal about documents of any length."""
