# cython: language_level=3
"""Dicts that are lent to apps: has one of them been changed?"""

cdef bint watches           # False: this Python cannot tell
cdef unsigned long changes  # of all that are watched, so far

cdef int watch(dict mapping) except -1
