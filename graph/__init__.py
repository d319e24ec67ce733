"""The compiler: a module and its shapes in, an immutable plan out. Pure; needs no GPU and no real weights."""
