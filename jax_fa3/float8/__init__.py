"""float8_e4m3fn arrays: how they are rounded, and the public way to them."""
