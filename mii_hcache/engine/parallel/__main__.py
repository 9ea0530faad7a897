"""`python -m mii_hcache.engine.parallel`: a rank other than 0. Rank 0 starts it; for people there is nothing here."""

import sys

from mii_hcache.engine.parallel.rank_process import main

if __name__ == "__main__":
    if len(sys.argv) != 7:
        sys.exit("this is one rank of several, which a server with --tensor-parallel starts")
    sys.exit(main(sys.argv[1:]))
