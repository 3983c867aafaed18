# cython: language_level=3
"""What other interfaces share of the native one: the request object that hooks see."""
from prefork cimport _core


cdef class Request(_core.Request):
    pass
