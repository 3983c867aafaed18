# TLS for the modules that call apps.
from prefork._core cimport Request

cdef object info_of(Request request)
cdef int set_environ(dict environ, Request request) except -1
cdef dict extension_of(Request request)
