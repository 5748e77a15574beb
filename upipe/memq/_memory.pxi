# Warm memory for frames that are copied out: fresh pages cost ten times the copy, so blocks are kept and used again.

cdef enum:
    BLOCK_MIN = 65536
    BLOCK_CLASSES = 24       # 64 KiB << 0 .. 23
    BLOCK_KEEP = 134217728   # bytes kept at most by the process, in free blocks of all sizes

cdef void *_free_blocks[BLOCK_CLASSES]   # each free block's first word links to the next one
cdef uint64_t _kept = 0


cdef class Block:
    """One piece of memory with the buffer protocol; its pages go back to the pool when nothing refers to it."""
    cdef uint8_t *data
    cdef Py_ssize_t size
    cdef int kind            # size class, -1 = plain malloc

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.data, self.size, 0, flags)

    def __dealloc__(self):
        global _kept
        cdef uint64_t whole
        if self.data == NULL:
            return
        if self.kind >= 0:
            whole = <uint64_t>BLOCK_MIN << self.kind
            if _kept + whole <= BLOCK_KEEP:
                (<void **>self.data)[0] = _free_blocks[self.kind]
                _free_blocks[self.kind] = self.data
                _kept += whole
                return
        free(self.data)


cdef Block _block(uint64_t size):
    global _kept
    cdef Block block = Block.__new__(Block)
    cdef void *data = NULL
    cdef int kind = -1
    cdef uint64_t whole = size if size else 1
    if size > BLOCK_MIN // 2:
        kind = 0
        while (<uint64_t>BLOCK_MIN << kind) < size:
            kind += 1
        if kind >= BLOCK_CLASSES:
            kind = -1
        else:
            whole = <uint64_t>BLOCK_MIN << kind
    if kind >= 0 and _free_blocks[kind] != NULL:
        data = _free_blocks[kind]
        _free_blocks[kind] = (<void **>data)[0]
        _kept -= whole
    elif posix_memalign(&data, 64, whole) != 0:
        raise MemoryError(f"no memory for a frame of {size:,} bytes")
    block.data = <uint8_t *>data
    block.size = size
    block.kind = kind
    return block
