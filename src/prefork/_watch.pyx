# cython: language_level=3, binding=True, freethreading_compatible=False
"""Dicts that are lent to apps: has one of them been changed?

What an app is called with is dear to make and to free, and most apps only read it. If
an app has neither kept a dict nor changed it, another one may have it. Who keeps it has
a reference; who changes it is seen by a watcher, which Python has from 3.12 on. It
counts for all of them together: where the count has moved, whoever cares looks closer,
or takes a new dict.
"""


cdef extern from *:
    """
    #if PY_VERSION_HEX >= 0x030C0000
    #define IS_CHANGE(event) ((event) != PyDict_EVENT_DEALLOCATED)
    #define add_watcher(watcher) PyDict_AddWatcher((PyDict_WatchCallback)(watcher))
    #else
    #define IS_CHANGE(event) 0
    #define add_watcher(watcher) ((void)(watcher), -1)
    #define PyDict_Watch(watcher, mapping) 0
    #endif
    """
    bint IS_CHANGE(int event)
    int add_watcher(void *watcher)
    int PyDict_Watch(int watcher, object mapping) except -1
    void PyErr_Clear()


cdef int note(int event, void *mapping, void *key, void *value) noexcept:
    global changes
    changes += IS_CHANGE(event)
    return 0


cdef int number = add_watcher(<void *>note)

if number < 0:
    PyErr_Clear()  # it has none, or others have them all
changes = 0
watches = number >= 0


cdef int watch(dict mapping) except -1:
    """Count the changes of this one, too."""
    return PyDict_Watch(number, mapping) if watches else 0
