# Commands as they go over the wire to Redis: one pass to measure them, one to write them. hiredis prints each length
# with sprintf, which for a command with a name for each of a thousand leases was a seventh of a worker's work.

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL


cdef inline int digits_of(Py_ssize_t number) noexcept nogil:
    cdef int digits = 1
    while number >= 10:
        number //= 10
        digits += 1
    return digits


cdef inline char *put_number(char *to, Py_ssize_t number, int digits) noexcept nogil:
    cdef int k
    for k in range(digits - 1, -1, -1):
        to[k] = <char>(48 + number % 10)
        number //= 10
    to[digits] = 13
    to[digits + 1] = 10
    return to + digits + 2


def pack_command(tuple arguments not None):
    """A command of bytes, texts and numbers as Redis reads it."""
    cdef list texts = []  # what stands for arguments that are not bytes, in order
    cdef bytes text
    cdef Py_ssize_t count = PyTuple_GET_SIZE(arguments), total = 3 + digits_of(count), size, at, other = 0
    cdef object argument
    for at in range(count):
        argument = <object>PyTuple_GET_ITEM(arguments, at)
        if PyBytes_CheckExact(argument):
            size = PyBytes_GET_SIZE(argument)
        else:
            text = as_text(argument)
            texts.append(text)
            size = PyBytes_GET_SIZE(text)
        total += size + 5 + digits_of(size)
    cdef bytes packed = PyBytes_FromStringAndSize(NULL, total)
    cdef char *to = PyBytes_AS_STRING(packed)
    to[0] = b"*"
    to = put_number(to + 1, count, digits_of(count))
    for at in range(count):
        argument = <object>PyTuple_GET_ITEM(arguments, at)
        if not PyBytes_CheckExact(argument):
            argument = <object>PyList_GET_ITEM(texts, other)
            other += 1
        size = PyBytes_GET_SIZE(argument)
        to[0] = b"$"
        to = put_number(to + 1, size, digits_of(size))
        memcpy(to, PyBytes_AS_STRING(argument), size)
        to[size] = 13
        to[size + 1] = 10
        to += size + 2
    return packed


cdef bytes as_text(object argument):
    cdef const char *characters
    cdef Py_ssize_t size = 0
    if PyUnicode_CheckExact(argument):
        characters = PyUnicode_AsUTF8AndSize(argument, &size)
        return PyBytes_FromStringAndSize(characters, size)
    if isinstance(argument, bytes):
        return bytes(argument)
    if isinstance(argument, (int, float)) and not isinstance(argument, bool):
        return repr(argument).encode()
    if isinstance(argument, str):
        return argument.encode()
    raise TypeError(f"Redis takes bytes, texts and numbers, not {type(argument).__name__}")
