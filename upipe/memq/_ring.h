/* The ring: frames of any size, any number of producers and consumers, in one shared mapping. C11, no Python.
 *
 * Include this file; the parts include each other downwards only:
 *
 *     _mirror.h      the two copies of a queue over two nodes: send, retire; receive, publish
 *     _members.h     who takes part: slots, producers and ends of stream, recovery of the dead
 *     _policies.h    how a newcomer without room gets it (beside the two above)
 *     _small.h       a small frame in one call (beside those above)
 *     _lock.h        the three robust locks, and what is mended when a holder died
 *     _consumers.h   the consumers' end: take, finish, give back, drop, advance
 *     _producers.h   the producers' end: room, claim, commit, abort
 *     _wake.h        who sleeps and who is woken             _bell.h   one doorbell
 *     _segment.h     the mapping, the words, the counters    _layout.h the table    _crc.h the checksum
 *
 * Life of a frame (its state word stands at the granule where it starts):
 *
 *     producer:  claim -> CLAIMED -> write -> COMMITTED           (put of a small frame: COMMITTED at once, under the lock)
 *                                 \-> ABORTED (padding)
 *     consumer:  take  -> TAKEN   -> read  -> FINISHED | DEAD     then tail passes it and the bytes are free again
 *                                 \-> AVAILABLE -> TAKEN ...      (given back, or its holder died)
 *                COMMITTED -> DROPPED                             (drop policies)
 *                COMMITTED -> gone                                (drop policy without room: head moves back over it, up_retract)
 *     mirror:    COMMITTED -> AVAILABLE                           (a source copy that is read here again; else it stays COMMITTED)
 *
 * Order of positions: tail <= next <= head <= tail + capacity, all multiples of 64 and monotonic (but for up_retract; and after a
 * hop head <= jump_to + capacity, see _producers.h). GAP: a state word without a frame; claims went on behind it.
 *
 * Two locks, one per end, never on one cache line and never nested but where a policy makes room (up_make_room; there
 * producer_lock is the outer one): producer_lock guards head, head_books, cached_tail, last and the claims of producers;
 * consumer_lock guards next, tail, tail_books, redeliver and every change of a COMMITTED state; head moves back under both. registry_lock guards slots, producers and stream; a recovery holds it throughout and takes the other two
 * one after the other inside it, so recoveries never race and a slot cannot change hands under one. All are robust: when a
 * holder dies the kernel hands the lock over (EOWNERDEAD) and the next holder repairs. Payloads move outside.
 *
 * Commit points are single 8-byte stores, so a crash leaves the old truth or the new one:
 *   - a claim exists once `head` moved (the state word was written before, beyond head nobody looks);
 *   - a take exists once `next` moved (the repair puts a TAKEN at `next` back to COMMITTED);
 *   - the low bit of head and tail selects one of two books, written before: position and counters change together;
 *   - a count beside a state (aborts of a producer, deliveries of a frame) is first noted in the state word, so that who
 *     repeats it after a crash knows whether it was made already.
 * kill -9 is precise: what a survivor sees is a prefix of the dead thread's instructions. UP_CRASH names the places where
 * that prefix matters and keeps the compiler from moving stores across them.
 *
 * SYNC head:    release in up_publish,        acquire in up_refresh_head        (state word and small payload before it)
 * SYNC commit:  release in up_commit, up_pad, acquire in up_peek                (payload before it)
 * SYNC tail:    release in up_advance,        acquire in up_refresh_tail        (reads of the payload before it)
 * SYNC books:   release of each counter,      acquire of each in up_books_read  (never seen before the selector left them)
 * SYNC stream:  release in up_recount_stream, acquire in up_ended               (the last claim before it)
 * SYNC waiting: bit set, fence, look again in up_arm;  commit, advance or close, fence, read bits in up_wake_*   (Dekker)
 */
#ifndef UPIPE_RING_H
#define UPIPE_RING_H

#include "_mirror.h"
#include "_policies.h"
#include "_small.h"

#endif
