"""What will go wrong on these machines, found before a run is started: each finding with its remedy.

Every probe runs in a process of its own that is killed when its time is up, so that a file system or a host that does
not answer cannot hold the others up; what could not be found out is said, too.
"""
