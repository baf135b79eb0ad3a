# Whether a payload is plain JSON data, looked at before it is encoded: the encoder turns NaN into null and other keys into strings.

from cpython.dict cimport PyDict_CheckExact, PyDict_Next
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact
from cpython.list cimport PyList_CheckExact
from cpython.long cimport PyLong_AsLongLongAndOverflow, PyLong_CheckExact
from cpython.object cimport PyObject
from cpython.tuple cimport PyTuple_CheckExact, PyTuple_GET_ITEM, PyTuple_GET_SIZE
from cpython.unicode cimport PyUnicode_CheckExact
from libc.math cimport isfinite

cdef enum:
    PAYLOAD_DEPTH_MAX = 64


cdef bint plain_dict(object value, int depth):
    cdef Py_ssize_t at = 0
    cdef PyObject *key = NULL
    cdef PyObject *item = NULL
    if depth > PAYLOAD_DEPTH_MAX:
        return False
    while PyDict_Next(value, &at, &key, &item):
        if not PyUnicode_CheckExact(<object>key):
            return False
        if not PyUnicode_CheckExact(<object>item) and not plain_value(<object>item, depth):
            return False
    return True


cdef bint plain_value(object value, int depth):
    cdef int overflow = 0
    cdef Py_ssize_t i
    if value is None or value is True or value is False or PyUnicode_CheckExact(value):
        return True
    if PyLong_CheckExact(value):
        PyLong_AsLongLongAndOverflow(value, &overflow)
        return overflow == 0
    if PyFloat_CheckExact(value):
        return isfinite(PyFloat_AS_DOUBLE(value)) != 0
    if PyDict_CheckExact(value):
        return plain_dict(value, depth + 1)
    if depth >= PAYLOAD_DEPTH_MAX:
        return False
    if PyList_CheckExact(value):
        for i in range(PyList_GET_SIZE(value)):
            if not plain_value(<object>PyList_GET_ITEM(value, i), depth + 1):
                return False
        return True
    if PyTuple_CheckExact(value):
        for i in range(PyTuple_GET_SIZE(value)):
            if not plain_value(<object>PyTuple_GET_ITEM(value, i), depth + 1):
                return False
        return True
    return False


def plain_payloads(list payloads not None):
    """How many payloads, from the first on, are certainly sound: dicts of plain JSON data, not too deep.

    The one at the place returned may still be sound; it needs the slow look of tqe.codec.payload.
    """
    cdef Py_ssize_t i
    for i in range(PyList_GET_SIZE(payloads)):
        item = <object>PyList_GET_ITEM(payloads, i)
        if not PyDict_CheckExact(item) or not plain_dict(item, 1):
            return i
    return PyList_GET_SIZE(payloads)
