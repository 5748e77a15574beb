# `DType.U32` as fast as any attribute of a class.

cdef extern from *:
    """
    static void up_plain_attributes(PyTypeObject *metaclass) {
        metaclass->tp_getattro = PyType_Type.tp_getattro;
        PyType_Modified(metaclass);
    }
    """
    void up_plain_attributes(PyTypeObject *metaclass)

# Python 3.11 gives the type of all enums a __getattr__, for members that are no attributes of their class. It makes
# each look at `DType.U32` cost a third of an emit, found or not. DType's members are attributes (_types.py), and its
# metaclass is its own. Python 3.12 has no such method, and nothing is left to do.
if hasattr(_Codes, "__getattr__"):
    up_plain_attributes(<PyTypeObject *>_Codes)
