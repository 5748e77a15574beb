# The hot part of encode and decode: scalars, str, bytes, plain arrays. All else goes through upipe.frame.

cdef enum:
    _NONE = 1
    _BOOL = 2
    _I8 = 3
    _I64 = 6
    _U8 = 7
    _U64 = 10
    _F32 = 12
    _F64 = 13
    _STR = 16
    _BYTES = 17
    _ARRAY = 18
    _PICKLE = 20

cdef struct Out:
    up_meta m
    const uint8_t *data      # payload that is not inline; kept alive by the caller's value

_NOTHING = (False, None)

import numpy as _np

# item code of the array table <-> numpy type number; DType code of a scalar <-> numpy type number
cdef int[24] _num_to_item
cdef int[14] _item_to_num
cdef int[14] _item_to_dtype
cdef int[14] _scalar_width  # bytes of an inline scalar, by DType code
for _i in range(24):
    _num_to_item[_i] = -1
for _i in range(14):
    _item_to_dtype[_i] = -1
    _scalar_width[_i] = 0
for _char in "?bhilqBHILQefdFD":  # "l" and "q" are both 8 bytes here
    _num_to_item[_np.dtype(_char).num] = [_np.dtype(_name).str for _name in _frame.ITEMS].index(_np.dtype(_char).str)
for _i, _name in enumerate(_frame.ITEMS):
    _item_to_num[_i] = _np.dtype(_name).num
for _i, _code in enumerate((2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13)):
    _item_to_dtype[_i] = _code
    _scalar_width[_code] = _np.dtype(_frame.ITEMS[_i]).itemsize
_dtype_to_num = {_item_to_dtype[_i]: _item_to_num[_i] for _i in range(12)}

cdef int64_t[4] _I_MIN
cdef uint64_t[4] _U_MAX
for _i in range(4):
    _I_MIN[_i] = -(1 << (8 * (1 << _i) - 1))
    _U_MAX[_i] = (1 << (8 * (1 << _i))) - 1


cdef inline double _timeout(block, timeout) except? -1.0:
    if not block:
        return 0.0
    if timeout is None:
        return INFINITY
    cdef double seconds = timeout
    return seconds if seconds > 0 else 0.0


cdef inline void _meta(up_meta *m, int dtype, int flags, uint64_t size) noexcept:
    m.dtype = dtype
    m.flags = flags
    m.item = 0
    m.rank = 0
    m.key = 0
    m.size = size
    m.inline_ = 0
    m.execution = 0
    m.timestamp = up_stamp()


cdef int _item_of(cnp.ndarray value) noexcept:
    cdef int num = cnp.PyArray_TYPE(value)
    return _num_to_item[num] if 0 <= num < 24 else -1


cdef inline bint _encode_int(object value, int dtype, Out *o) except -1:
    """True when the int fits the DType and is in o; False leaves it to the reference codec (and its errors)."""
    cdef int overflow = 0, shift
    cdef int64_t number = PyLong_AsLongLongAndOverflow(value, &overflow)
    if overflow:
        return False
    if dtype == -1 or dtype == _I64:
        _meta(&o.m, _I64, UP_FLAG_INLINE, 8)
        o.m.inline_ = <uint64_t>number
        return True
    if _U8 <= dtype <= _U64:
        shift = dtype - _U8
        if number < 0 or (shift < 3 and <uint64_t>number > _U_MAX[shift]):
            return False
        _meta(&o.m, dtype, UP_FLAG_INLINE, 1 << shift)
        o.m.inline_ = <uint64_t>number
        return True
    if _I8 <= dtype < _I64:
        shift = dtype - _I8
        if number < _I_MIN[shift] or number > -(_I_MIN[shift] + 1):
            return False
        _meta(&o.m, dtype, UP_FLAG_INLINE, 1 << shift)
        o.m.inline_ = <uint64_t>number & _U_MAX[shift]
        return True
    return False


cdef void _encode_bytes(const char *data, Py_ssize_t size, int dtype, Out *o) noexcept:
    if size <= 8:
        _meta(&o.m, dtype, UP_FLAG_INLINE, size)
        memcpy(&o.m.inline_, data, size)
    else:
        _meta(&o.m, dtype, 0, size)
        o.data = <const uint8_t *>data


cdef extern from *:
    """
    static const uint8_t up_dim_bits[] = {0, 63, 31, 21, 15, 12, 10, 9, 7}; /* 63 / rank */
    """
    const uint8_t *up_dim_bits

cdef enum:
    SHAPE_RANK = 8          # as _types.SHAPE_RANK


cdef bint _encode_array(cnp.ndarray value, Out *o) except -1:
    cdef int item = _item_of(value), rank = value.ndim, i
    if item < 0 or rank > SHAPE_RANK or not cnp.PyArray_IS_C_CONTIGUOUS(value) or not cnp.PyArray_ISNOTSWAPPED(value):
        return False
    _meta(&o.m, _ARRAY, UP_FLAG_SHAPE, cnp.PyArray_NBYTES(value))
    for i in range(rank):
        if <uint64_t>value.shape[i] >> up_dim_bits[rank]:
            return False
        o.m.inline_ |= <uint64_t>value.shape[i] << (up_dim_bits[rank] * i)
    o.m.item = item
    o.m.rank = rank
    o.data = <const uint8_t *>cnp.PyArray_DATA(value)
    return True


cdef inline list _encode(object value, int dtype, Out *o, bint allow_pickle):
    """Fill o. Returns None when the payload is inline or o.data points into value, else the parts to copy."""
    o.data = NULL
    if type(value) is int and _encode_int(value, dtype, o):
        return None
    return _encode_other(value, dtype, o, allow_pickle)


cdef list _encode_other(object value, int dtype, Out *o, bint allow_pickle):
    cdef Py_ssize_t size
    cdef double number
    kind = type(value)
    if kind is float:
        if dtype == -1 or dtype == _F64:
            _meta(&o.m, _F64, UP_FLAG_INLINE, 8)
            number = PyFloat_AS_DOUBLE(value)
            memcpy(&o.m.inline_, &number, 8)
            return None
    elif kind is bytes:
        if dtype == -1 or dtype == _BYTES:
            _encode_bytes(PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value), _BYTES, o)
            return None
    elif kind is str:
        if dtype == -1 or dtype == _STR:
            try:
                text = PyUnicode_AsUTF8AndSize(value, &size)
            except UnicodeEncodeError:
                pass  # lone surrogates: the reference codec says what to do
            else:
                _encode_bytes(text, size, _STR, o)
                return None
    elif kind is cnp.ndarray:
        if (dtype == -1 or dtype == _ARRAY) and _encode_array(value, o):
            return None
    elif kind is bool:
        if dtype == -1 or dtype == _BOOL:
            _meta(&o.m, _BOOL, UP_FLAG_INLINE, 1)
            o.m.inline_ = value is True
            return None
    elif value is None:
        if dtype == -1 or dtype == _NONE:
            _meta(&o.m, _NONE, UP_FLAG_INLINE, 0)
            return None
    encoded = _frame.encode(value, None if dtype == -1 else dtype, allow_pickle=allow_pickle)
    _meta(&o.m, encoded.dtype, encoded.flags, encoded.size)
    o.m.item = encoded.item
    o.m.rank = encoded.rank
    o.m.inline_ = encoded.inline
    return list(encoded.parts)


cdef object _array_view(up_frame *f, object base, void *data, bint writeable):
    """An array over `data`, kept alive by base. None when the frame is not of the plain kind."""
    cdef cnp.npy_intp dims[SHAPE_RANK]
    cdef uint64_t count = 1  # fits: all dims together have 63 bits
    cdef int i, bits
    cdef cnp.dtype descr
    cdef cnp.ndarray out
    if not f.flags & UP_FLAG_SHAPE or f.item >= 14 or f.rank > SHAPE_RANK:
        return None
    bits = up_dim_bits[f.rank]
    if f.inline_ >> (bits * f.rank):
        return None
    for i in range(f.rank):
        dims[i] = (f.inline_ >> (bits * i)) & ((<uint64_t>1 << bits) - 1)
        count *= <uint64_t>dims[i]
    descr = cnp.PyArray_DescrFromType(_item_to_num[f.item])
    if count > f.size or count * <uint64_t>descr.itemsize != f.size:  # the product of what is larger might wrap around
        return None
    Py_INCREF(descr)  # stolen by the call
    out = PyArray_NewFromDescr(<void *>cnp.ndarray, descr, f.rank, dims, NULL, data,
                               NPY_ARRAY_CARRAY if writeable else NPY_ARRAY_CARRAY & ~NPY_ARRAY_WRITEABLE, None)
    Py_INCREF(base)
    PyArray_SetBaseObject(out, base)
    return out


cdef inline object _decode(up_frame *f, object payload, bint allow_pickle):
    """The value of a checked frame; payload is a Block (None when inline or empty)."""
    cdef int dtype = f.dtype, shift
    cdef double number
    cdef float single
    if f.flags & UP_FLAG_INLINE:
        if dtype == _I64 and f.size == 8:
            return <int64_t>f.inline_
        if _U8 <= dtype <= _U64 and f.size == <uint64_t>1 << (dtype - _U8):
            return f.inline_ & _U_MAX[dtype - _U8]
        if dtype == _F64 and f.size == 8:
            memcpy(&number, &f.inline_, 8)
            return number
        if _I8 <= dtype < _I64 and f.size == <uint64_t>1 << (dtype - _I8):
            shift = 64 - 8 * (1 << (dtype - _I8))
            return <int64_t>(f.inline_ << shift) >> shift
        if dtype == _F32 and f.size == 4:
            memcpy(&single, &f.inline_, 4)
            return <double>single
        if dtype == _BOOL and f.size == 1 and f.inline_ <= 1:
            return f.inline_ == 1
        if dtype == _NONE and f.size == 0:
            return None
        if f.size <= 8:
            if dtype == _BYTES:
                return PyBytes_FromStringAndSize(<char *>&f.inline_, f.size)
            if dtype == _STR:
                return PyUnicode_DecodeUTF8(<char *>&f.inline_, f.size, NULL)
        payload = memoryview(b"")
    elif dtype == _STR:
        return PyUnicode_DecodeUTF8(<char *>(<Block>payload).data, f.size, NULL)
    elif dtype == _ARRAY:
        value = _array_view(f, payload, (<Block>payload).data, True)
        if value is not None:
            return value
    return _frame.decode(f.dtype, f.item, f.rank, f.flags, f.inline_, f.size, memoryview(payload),
                         allow_pickle=allow_pickle)


cdef object _scalar_array(cnp.ndarray values, int dtype):
    """A contiguous 1-d array whose elements are scalars of that DType (or of their own), or None."""
    cdef int item
    if values.ndim != 1 or not cnp.PyArray_ISNOTSWAPPED(values):
        return None
    item = _item_of(values)
    if item < 0 or item >= 12 or (dtype != -1 and _item_to_dtype[item] != dtype):
        return None
    return cnp.PyArray_GETCONTIGUOUS(values)


cdef cnp.ndarray _array_of(int dtype, Py_ssize_t length):
    """A fresh 1-d array; a large one in warm memory."""
    cdef cnp.npy_intp dims[1]
    cdef cnp.dtype descr = cnp.PyArray_DescrFromType(_dtype_to_num[dtype])
    cdef Block block
    dims[0] = length
    if length * descr.itemsize <= BLOCK_MIN // 2:
        return cnp.PyArray_EMPTY(1, dims, descr.num, 0)
    block = _block(length * descr.itemsize)
    Py_INCREF(descr)  # stolen by the call
    out = PyArray_NewFromDescr(<void *>cnp.ndarray, descr, 1, dims, NULL, block.data, NPY_ARRAY_CARRAY, None)
    Py_INCREF(block)
    PyArray_SetBaseObject(out, block)
    return out


cdef inline uint64_t _element(const uint8_t *data, Py_ssize_t i, Py_ssize_t width) noexcept nogil:
    """Element i of an array of scalars, zero-extended. memcpy of known sizes: the address need not be aligned."""
    cdef uint64_t value = 0
    if width == 8:
        memcpy(&value, data + i * 8, 8)
    elif width == 4:
        memcpy(&value, data + i * 4, 4)
    elif width == 2:
        memcpy(&value, data + i * 2, 2)
    else:
        value = data[i]
    return value


cdef inline void _set_element(uint8_t *data, Py_ssize_t i, Py_ssize_t width, uint64_t value) noexcept nogil:
    if width == 8:
        memcpy(data + i * 8, &value, 8)
    elif width == 4:
        memcpy(data + i * 4, &value, 4)
    elif width == 2:
        memcpy(data + i * 2, &value, 2)
    else:
        data[i] = <uint8_t>value


cdef inline bint _is_plain(up_frame *f, bint scalars) noexcept nogil:
    """An inline value whose decoding cannot fail. scalars: numbers and bools only."""
    if not f.flags & UP_FLAG_INLINE:
        return False
    if _BOOL <= f.dtype <= _F64:
        return f.size == <uint64_t>_scalar_width[f.dtype] and (f.dtype != _BOOL or f.inline_ <= 1)
    if scalars:
        return False
    if f.dtype == _BYTES:
        return f.size <= 8
    if f.dtype == _STR:
        return f.size <= 8 and not f.inline_ & <uint64_t>0x8080808080808080
    return f.dtype == _NONE and f.size == 0


def _sorted_positions(positions):
    return _np.sort(_np.asarray(list(positions), dtype=_np.uint64))
