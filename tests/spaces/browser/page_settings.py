"""Where the page's search for patches differs from the package's, which it otherwise repeats."""

# Pairs of patches up to which all are compared: fewer than in the package, since it takes longer on a page.
EXACT = 50_000_000
