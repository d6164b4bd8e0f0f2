"""Packing: a program becomes one file that runs as driver here and as worker anywhere.

What is in the file
-------------------
A packed program is an executable file: a header for ``/bin/sh``, then a zip archive. What a builder (pex, shiv) made of
the distributions is in it as the builder's users know it; beside it, under ``.bigmachine/``:

==============================  ====================================================================================
``.bigmachine/program.json``    what this program is (`archive.Contents`): entry, Python, digest, parts per platform
``.bigmachine/code/<path>``     the user's own code and data, as it lies below the script's directory
the archive's comment           ``bigmachine sha256:<hex>`` of all bytes before the comment: is the file whole?
==============================  ====================================================================================

The builder's part is made once for a set of distributions and kept in the cache (a *base*); a change to the user's code
copies the base and appends. So it is as well when the program runs: a base is installed once, however often the code changes.

How it is made
--------------
Each step has a module, and hands values to the next:

1. `source`: which files are the user's own code, and which modules from elsewhere they import (`Source`).
2. `requirements`: which distributions that means, and why (`Wanted`).
3. `platforms`: what a platform's name stands for (`Platform`).
4. `resolve`: one `Wheel` per distribution and platform, the same versions on all; from the cache where it was done before.
5. `closure`, `measure`, `image`: what of it a worker gets, as content-addressed parts (`Manifest`).
6. `builders`: the base; `assemble`: the file.

`archive` reads such a file again. What the file does when it is executed is in `bigmachine.program`.
"""
