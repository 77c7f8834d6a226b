"""Timings of fastnet against the strongest alternatives, in one run and verified for equality."""
