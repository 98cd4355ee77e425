"""How the commands tell why they ended."""

INTERRUPTED = 130  # as shells report Ctrl-C
START_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: the scripts in launch/ start the same command again
