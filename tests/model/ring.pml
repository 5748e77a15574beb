/* The ring of uPipe (upipe/memq/_ring.h): claim, commit, take, finish, crash, recovery, waiting, end of stream.
 *
 * README.md: what is proved, within which bounds, what is left out, how to run. test_ring_model.py: every
 * configuration, and every variant that breaks one rule (NO_..., BAD_..., RECLAIM_...) and therefore must fail.
 *
 * Form: guarded commands. Each `atomic` is one step: one access to shared memory that another process can see, and
 * whatever with it is local, ghost, or invisible to others (behind head, or in the copy of the counters that is not
 * valid). A process can be killed before each step. The fences of the C code are the order of the steps.
 */

#ifndef NP
#define NP 1                    /* producers: participants 0 .. NP-1 */
#endif
#ifndef NC
#define NC 1                    /* consumers: participants NP .. N-1 */
#endif
#ifndef NF
#define NF 2                    /* frames that each producer puts */
#endif
#ifndef CAP
#define CAP 3                   /* granules in the ring */
#endif
#ifndef LEN0
#define LEN0 1                  /* granules of a producer's first frame */
#endif
#ifndef LEN1
#define LEN1 1                  /* granules of its other frames */
#endif
#define LEN(k) (k == 0 -> LEN0 : LEN1)
#ifdef SMALL_FRAMES             /* all but a producer's first: written and committed, read and finished under lock */
#define SMALL(k) (k > 0)
#else
#define SMALL(k) false
#endif
#ifndef CRASHES
#define CRASHES 0               /* at most so many kill -9; every smaller number is explored too */
#endif
#ifndef REAPERS
#define REAPERS 1               /* processes that recover the dead */
#endif

#define N (NP + NC)

/* ---- shared memory ------------------------------------------------------------------------------------- */

/* The state word {kind, owner, len} of the granule where a frame begins; always stored at once. */
#define CLAIMED   1
#define COMMITTED 2
#define TAKEN     3
#define AVAILABLE 4
#define FINISHED  5             /* DROPPED and DEAD are the same to everything below; not modelled apart */
#define ABORTED   6
byte kind[CAP], owner[CAP], size[CAP];

byte head, next, tail;          /* positions in granules, monotonic */
bit head_copy, tail_copy;       /* low bits of the head word and the tail word: which copy of the counters is valid */
byte claims[2], finishes[2], aborts[2];
byte redeliver;                 /* how many frames in [tail, next) are AVAILABLE; under C */
byte deliveries[CAP];           /* the delivery count in the header */
bool closed[NP];                /* under P */
#ifdef JUMPS                    /* frames of one granule; a claim may jump whenever it can, warm memory or not */
byte jump_from, jump_to;        /* under P: the latest jump's gap, true once head is behind it */
#endif

#define FREE 0
#define ORPHAN 255              /* the holder died: the next locker gets EOWNERDEAD */
byte P, C, R;                   /* robust mutexes of the producer end, the consumer end, recovery: holder + 1 */

bool waiting[N];                /* a waiter's flag, cleared by exactly one waker, or by the waiter */
bool bell[N];                   /* its doorbell holds a token */
bool dead[N];                   /* proven dead and not yet recovered: the participant slot is not free */

/* ---- ghosts, for the properties only ---------------------------------------------------------------------- */

#define FRAME(p, k) ((p) * NF + (k))
byte data[CAP];                 /* the frame whose bytes are in this granule, + 1; 0 = torn, or nobody cares */
byte user[CAP];                 /* the live process that may read or write these bytes now, + 1 */
bool committed[NP * NF], finished[NP * NF];
byte delivered[NP * NF];        /* times the frame was handed to a user */
byte deaths[NP * NF];           /* times a process died that held the frame */
byte budget;                    /* kills left */
byte corpses;                   /* dead and not recovered */
byte done;                      /* participants that ended */
#if defined(RECLAIM_WRITER) || defined(RECLAIM_READER)
#define RECLAIM_ON_TIMEOUT
bool timed_out;
#endif

/* ---- words ------------------------------------------------------------------------------------------------- */

#define SLOT(position) ((position) % CAP)
#define AT_NEXT(k) (next < head && kind[SLOT(next)] == k)
#define AT(position, k, who) (kind[SLOT(position)] == k && owner[SLOT(position)] == who)
#define OVER(position) (kind[SLOT(position)] == FINISHED || kind[SLOT(position)] == ABORTED)
#if NP == 1
#define ALL_CLOSED (closed[0])
#elif NP == 2
#define ALL_CLOSED (closed[0] && closed[1])
#endif
#ifdef SMALL_FRAMES
#define NEXT_SMALL SMALL((data[SLOT(next)] - 1) % NF)
#else
#define NEXT_SMALL false
#endif
#define DRAINED (ALL_CLOSED && tail == head)
#define TAKEABLE (redeliver > 0 || AT_NEXT(COMMITTED) || AT_NEXT(ABORTED))
#define SETTLED(p, k) (!committed[FRAME(p, k)] || finished[FRAME(p, k)])
#if NF == 1
#define ALL_SETTLED(p) (SETTLED(p, 0))
#elif NF == 2
#define ALL_SETTLED(p) (SETTLED(p, 0) && SETTLED(p, 1))
#elif NF == 3
#define ALL_SETTLED(p) (SETTLED(p, 0) && SETTLED(p, 1) && SETTLED(p, 2))
#endif
#if NP * NF == 2
#define ALL_BUT_ONE (finished[0] + finished[1] == 1)
#elif NP * NF == 3
#define ALL_BUT_ONE (finished[0] + finished[1] + finished[2] == 2)
#elif NP * NF == 4
#define ALL_BUT_ONE (finished[0] + finished[1] + finished[2] + finished[3] == 3)
#endif
#ifdef RECLAIM_ON_TIMEOUT       /* these variants must break this very property: nobody touches bytes in use */
#define CHECK(...) skip
#else
#define CHECK(...) assert(__VA_ARGS__)
#endif

#if CRASHES > 0
#define KILL atomic { budget > 0 -> budget--; goto died }
#else
#define KILL atomic { false -> goto died }
#endif
#define STEP(...) if :: atomic { __VA_ARGS__ } :: KILL fi
#define HELD(m) (m == me + 1)
#define ORPHANED(m) if :: HELD(m) -> m = ORPHAN :: else fi

#ifdef JUMPS
#define JUMPED (tail < jump_to && head > jump_to)
#ifdef BAD_HOP                  /* onto the state word of the jump's gap */
#define HOP_TO (jump_from + CAP)
#define HOPPED (head >= jump_from + CAP)
#else
#define HOP_TO (jump_from + CAP + 1)
#define HOPPED (head > jump_from + CAP)
#endif
#ifdef NO_HOP_WORD              /* no granule is kept for the state word of the hop's gap */
#define LIMIT (JUMPED -> (HOPPED -> jump_to + CAP : tail + CAP) : tail + CAP)
#define CAN_HOP (JUMPED && !HOPPED && HOP_TO + 1 <= jump_to + CAP)
#else
#define LIMIT (JUMPED -> (HOPPED -> jump_to + CAP : tail + CAP - 1) : tail + CAP)
#define CAN_HOP (JUMPED && !HOPPED && head + 1 <= tail + CAP && HOP_TO + 1 <= jump_to + CAP)
#endif
#define CAN_JUMP (tail >= jump_to && head - tail + 3 <= CAP)
#ifdef NO_REPAIR_JUMP
#define MEND_P skip
#else                           /* the holder of P died: head did not get to where it was to jump */
#define MEND_P if :: P == ORPHAN && jump_to >= head -> jump_to = tail; jump_from = tail :: else fi
#endif
#else
#define LIMIT (tail + CAP)
#define CAN_HOP false
#define HOP_TO 0
#define MEND_P skip
#endif

/* Mark the bytes of the frame at slot s as used, or no more used, by me. */
inline use(s, n) {
    g = 0;
    do
    :: g < n -> assert(user[s + g] == 0); user[s + g] = me + 1; g++
    :: else -> break
    od;
    g = 0
}

inline unuse(s, n, what) {
    g = 0;
    do
    :: g < n -> data[s + g] = what; user[s + g] = 0; g++
    :: else -> break
    od;
    g = 0
}

/* Exchange the flag with 0, and ring where it was set. A waker killed in between leaves a sleeper with its flag
 * down, so recovery cannot go by the flags. */
inline wake_one(low, high) {
    do
    :: atomic { hit -> bell[low + j] = true; hit = false; j = 0; break }
    :: atomic { !hit && waiting[low + j] -> waiting[low + j] = false; hit = true }
    :: atomic { !hit && !waiting[low + j] -> j++; if :: low + j == high -> j = 0; break :: else fi }
    :: KILL
    od
}

inline wake_all(low, high) {
    do
    :: atomic { hit -> bell[low + j] = true; hit = false; j++; if :: low + j == high -> j = 0; break :: else fi }
    :: atomic { !hit && waiting[low + j] -> waiting[low + j] = false; hit = true }
    :: atomic { !hit && !waiting[low + j] -> j++; if :: low + j == high -> j = 0; break :: else fi }
    :: KILL
    od
}

/* Under C, where [tail, next) stands still: the new tail into t, if it moves, and its counters into the copy that
 * is not valid yet. Then one store of the tail word makes both valid. */
inline prepare_tail() {
    t = tail;
    finishes[1 - tail_copy] = finishes[tail_copy];
    aborts[1 - tail_copy] = aborts[tail_copy];
    do
    :: t < next && kind[SLOT(t)] == FINISHED -> finishes[1 - tail_copy]++; t = t + size[SLOT(t)]
    :: t < next && kind[SLOT(t)] == ABORTED -> aborts[1 - tail_copy]++; t = t + size[SLOT(t)]
    :: !(t < next && OVER(t)) -> break
    od;
    if :: t == tail -> t = 0 :: else fi
}

inline store_tail() { tail = t; tail_copy = 1 - tail_copy; t = 0; moved = true }

/* The holder of C died. TAKEN at next is a take that did not get to advance next; but only with next < head:
 * in a full ring that is wholly taken, the slot of next is the slot of tail, and belongs to a live reader.
 * FINISHED at next is the same of a small frame, which is taken, read and finished at once. */
inline repair_next() {
#ifdef NO_HEAD_CHECK                                    /* what stands at the slot of next, whatever position that is */
    if :: kind[SLOT(next)] == TAKEN -> kind[SLOT(next)] = COMMITTED; owner[SLOT(next)] = 0 :: else fi
#elif defined(BAD_HEAD_CHECK)                            /* by the dead owner instead of by head */
    if
    :: kind[SLOT(next)] == TAKEN && dead[owner[SLOT(next)]] -> kind[SLOT(next)] = COMMITTED; owner[SLOT(next)] = 0
    :: else
    fi
#elif !defined(NO_REPAIR_NEXT)
    if :: AT_NEXT(TAKEN) || AT_NEXT(FINISHED) -> kind[SLOT(next)] = COMMITTED; owner[SLOT(next)] = 0 :: else fi
#else
    skip
#endif
}

inline repair_counts() {
#ifndef NO_RECOUNT
    redeliver = 0;
    t = tail;
    do
    :: t < next -> if :: kind[SLOT(t)] == AVAILABLE -> redeliver++ :: else fi; t = t + size[SLOT(t)]
    :: else -> break
    od;
    t = 0;
#endif
#ifndef NO_REPAIR_WALK
    prepare_tail()                                      /* the dead one may have finished a frame and no more */
#endif
}

inline count_delivery() {
    assert(data[s] > 0);
    delivered[data[s] - 1]++;
    assert(delivered[data[s] - 1] <= 1 + deaths[data[s] - 1]);
    assert(delivered[data[s] - 1] <= deliveries[s]);
#if NC == 1
    if                                                  /* one consumer: first in, first out per producer */
    :: delivered[data[s] - 1] == 1 && (data[s] - 1) % NF > 0 && committed[data[s] - 2] ->
        assert(delivered[data[s] - 2] > 0 || finished[data[s] - 2])
    :: else
    fi;
#endif
}

#ifdef BAD_COUNTERS             /* in place, beside the head word */
#define COUNT_CLAIM claims[head_copy] = claims[head_copy] + 1 + (pad > 0)
#define FLIP_CLAIM skip
#else
#define COUNT_CLAIM claims[1 - head_copy] = claims[head_copy] + 1 + (pad > 0)
#define FLIP_CLAIM head_copy = 1 - head_copy
#endif

/* ---- the producer ------------------------------------------------------------------------------------------ */

proctype Producer(byte me) {
    byte k, at, pad, j, g;
    bool armed, hit;

    do
    :: k < NF ->
again:
        /* Lock P (after EOWNERDEAD only a jump is to be repaired), read tail, and with too little room unlock. With room
         * write what lies behind head, where nobody looks: padding up to the end of the ring or the gap of a jump, the
         * state word, and the counters that are not valid yet. A hop is a gap of its own, before that. */
        if
        :: atomic { P == FREE || P == ORPHAN ->
            MEND_P;
            pad = (SLOT(head) + LEN(k) > CAP -> CAP - SLOT(head) : 0);
            if
            :: head + pad + LEN(k) > LIMIT && CAN_HOP -> pad = 0; P = me + 1; goto hop
            :: head + pad + LEN(k) > LIMIT && !CAN_HOP -> P = FREE; pad = 0; goto no_room
            :: else
            fi;
            P = me + 1;
write:
#ifdef JUMPS
            if
            :: CAN_JUMP -> pad = CAP - 2 - (head - tail); jump_from = head; jump_to = head + pad
            :: CAN_JUMP && head - tail + 4 <= CAP ->            /* a window of two frames below tail */
                pad = CAP - 3 - (head - tail); jump_from = head; jump_to = head + pad
            :: true
            fi;
#endif
            if
            :: pad > 0 -> kind[SLOT(head)] = ABORTED; owner[SLOT(head)] = 0; size[SLOT(head)] = pad
            :: else
            fi;
            at = SLOT(head + pad);
            size[at] = LEN(k); deliveries[at] = 1;
            if
            :: SMALL(k) -> assert(user[at] == 0); data[at] = FRAME(me, k) + 1; kind[at] = COMMITTED; owner[at] = 0
            :: else -> kind[at] = CLAIMED; owner[at] = me
            fi;
            COUNT_CLAIM }
        :: KILL
        fi;
        STEP( head = head + pad + LEN(k); FLIP_CLAIM; pad = 0; P = FREE;
              if :: armed -> waiting[me] = false; armed = false :: else fi;
              if
              :: SMALL(k) -> committed[FRAME(me, k)] = true; at = 0; goto committed_now
              :: else -> use(at, LEN(k))
              fi );
#ifdef BAD_WAKE_FIRST
        wake_one(NP, N);                                        /* what a missing fence in the waker allows */
#endif
        STEP( CHECK(AT(at, CLAIMED, me) && user[at] == me + 1);
              unuse(at, LEN(k), FRAME(me, k) + 1);
              kind[at] = COMMITTED; owner[at] = 0; committed[FRAME(me, k)] = true; at = 0 );
committed_now:
#ifndef BAD_WAKE_FIRST
        wake_one(NP, N);                                        /* full fence, then read the flags */
#endif
        k++;
        goto next_frame;
hop:
#ifdef JUMPS
        STEP( pad = HOP_TO - head; kind[SLOT(head)] = ABORTED; owner[SLOT(head)] = 0; size[SLOT(head)] = pad;
              claims[1 - head_copy] = claims[head_copy] + 1;
              head = head + pad; head_copy = 1 - head_copy; pad = 0 );
        if
        :: atomic { true -> goto write }
        :: KILL
        fi;
#endif
no_room:
        if
        :: atomic { !armed -> waiting[me] = true; armed = true }        /* full fence, then look again */
        :: atomic { armed && bell[me] -> bell[me] = false; armed = false }
#ifdef GIVE_UP                                                  /* the first producer stops waiting for room */
        :: atomic { armed && me == 0 -> waiting[me] = false; armed = false; k = NF; goto next_frame }
#endif
        :: KILL
        fi;
        goto again;
next_frame:
    :: else -> break
    od;
#ifdef PATIENT                                          /* closes late: the wake-up of the end hides no lost one */
    STEP( ALL_SETTLED(me) );
#endif
    STEP( P == FREE || P == ORPHAN -> MEND_P; P = me + 1 );
    STEP( closed[me] = true; P = FREE );
#ifndef NO_CLOSER_WAKE
    if
    :: atomic { ALL_CLOSED }
        wake_all(NP, N)
    :: atomic { !ALL_CLOSED }
    :: KILL
    fi;
#endif
    atomic { k = 0; done++; goto ended };

died:
    atomic {
        ORPHANED(P);
        do
        :: g < CAP -> if :: user[g] == me + 1 -> user[g] = 0 :: else fi; g++
        :: else -> break
        od;
        k = 0; at = 0; pad = 0; j = 0; g = 0; armed = false; hit = false;
        dead[me] = true; corpses++
    };
ended:
}

/* ---- the consumer ------------------------------------------------------------------------------------------ */

#ifdef LEAVE                                            /* the first consumer may give up, or be drained, at any get */
#define MAY_LEAVE (me == NP)
#else
#define MAY_LEAVE false
#endif

#ifdef LEAN_CHAIN               /* as in _ring.pyx: after the unlock, and only by one that was woken; see README.md */
#define NO_CHAIN
#define BAD_FLAG_LATE
#endif
#if defined(BAD_LEAVE) || defined(BAD_PASS_ON) || defined(LEAN_CHAIN)
#define USES_WOKEN
#define WOKEN(x) woken = x
#else
#define WOKEN(x) skip
#endif
#ifdef SMALL_FRAMES
#define CONSUMED consumed
#else
#define CONSUMED false
#endif
#define CALM (fix == 0 && t == 0 && mine == 0)           /* repaired, walked, own frame finished */
#define LOOKS (CALM && !leaving && !CONSUMED)
#define PAST (LOOKS && !AT_NEXT(ABORTED) && !skipped)

proctype Consumer(byte me) {
    byte mine, s, t, j, g;                              /* mine: the slot of the frame that it holds, + 1 */
    bool moved, skipped, armed, hit, end, more, leaving;
#ifdef USES_WOKEN
    bool woken;
#endif
#ifdef SMALL_FRAMES
    bool consumed;
#endif
#ifdef NO_WAKE_AFTER_SKIP
    bool quiet;
#endif
    byte fix;

alive:
look:
    if
    :: atomic { C == FREE -> C = me + 1 }
    :: atomic { C == ORPHAN -> C = me + 1; fix = 1 }
    :: atomic { MAY_LEAVE && !leaving -> leaving = true; goto look }
    :: KILL
    fi;
    do                                                  /* C is held */
    :: atomic { fix == 1 -> repair_next(); fix = 2 }
    :: atomic { fix == 2 -> repair_counts(); fix = 0 }
    :: atomic { fix == 0 && t > 0 -> store_tail();
#ifdef NO_WAKE_AFTER_SKIP
        moved = moved && !quiet; quiet = false
#endif
        }
    :: atomic { fix == 0 && t == 0 && mine > 0 ->
        s = mine - 1;
        CHECK(AT(s, TAKEN, me) && user[s] == me + 1);
        if :: data[s] > 0 -> finished[data[s] - 1] = true :: else fi;
        unuse(s, size[s], 0);
        kind[s] = FINISHED; owner[s] = 0; deliveries[s] = 0; s = 0; mine = 0;
        prepare_tail() }
    :: atomic { CALM && leaving -> C = FREE; break }
    :: atomic { LOOKS && AT_NEXT(ABORTED) ->
        next = next + size[SLOT(next)];
        skipped = true }
    :: atomic { LOOKS && !AT_NEXT(ABORTED) && skipped ->
        skipped = false;
#ifndef NO_WALK_AFTER_SKIP
        prepare_tail();                                 /* nobody else will: a skipped frame is never finished */
#endif
#ifdef NO_WAKE_AFTER_SKIP
        quiet = true
#endif
        }
    :: atomic { PAST && redeliver > 0 ->
        t = tail;
        do :: kind[SLOT(t)] == AVAILABLE -> break :: else -> t = t + size[SLOT(t)] od;
        s = SLOT(t); t = 0;
        kind[s] = TAKEN; owner[s] = me }
        STEP( redeliver-- );
        goto take
#ifdef SMALL_FRAMES
    :: atomic { PAST && redeliver == 0 && AT_NEXT(COMMITTED) && NEXT_SMALL ->
        assert(user[SLOT(next)] == 0);                  /* its copy is made here */
        kind[SLOT(next)] = FINISHED; consumed = true }
        STEP( s = SLOT(next); next = next + 1;
              count_delivery();
              finished[data[s] - 1] = true; data[s] = 0; deliveries[s] = 0; s = 0;
              prepare_tail() )
    :: atomic { CALM && CONSUMED ->
        if :: armed -> waiting[me] = false; armed = false :: else fi;
        more = TAKEABLE;
        C = FREE;
        break }
#endif
    :: atomic { PAST && redeliver == 0 && AT_NEXT(COMMITTED) && !NEXT_SMALL ->
#ifdef BAD_TAKE_ORDER
        s = SLOT(next); next = next + size[s] }
        STEP( kind[s] = TAKEN; owner[s] = me );
#else
        s = SLOT(next); kind[s] = TAKEN; owner[s] = me }
        STEP( next = next + size[s] );
#endif
        goto take
    :: atomic { PAST && redeliver == 0 && !AT_NEXT(COMMITTED) ->
#ifdef BAD_END_ORDER
        end = (tail == head) }
        STEP( end = end && ALL_CLOSED; C = FREE )
#else
        end = DRAINED;                                  /* closed first, then head, which stands still by then */
        C = FREE }
#endif
        break
    :: KILL
    od;
    goto unlocked;

take:   /* C is held. One flag may have been cleared for a frame that is not the one taken: so first take the own
     * flag down, and then look whether more is there for somebody else. */
#ifndef BAD_FLAG_LATE
    STEP( if :: armed -> waiting[me] = false; armed = false :: else fi );
#endif
    STEP(
#ifndef NO_CHAIN
          more = TAKEABLE;
#endif
          C = FREE;
          use(s, size[s]);
#ifndef RECLAIM_ON_TIMEOUT
          count_delivery();
#endif
          mine = s + 1; s = 0
#ifndef LEAN_CHAIN
          ; WOKEN(false)
#endif
          );
#if defined(BAD_FLAG_LATE) && !defined(LEAN_CHAIN)
    STEP( if :: armed -> waiting[me] = false; armed = false :: else fi );
#endif

unlocked:
    if
    :: moved ->
        moved = false;
#ifdef BAD_WAKE_ONE_PRODUCER
        wake_one(0, NP);
#else
        wake_all(0, NP);                                /* full fence, then read the flags */
#endif
#ifndef NO_FINISHER_WAKE
        if
        :: atomic { DRAINED }
            wake_all(NP, N)
        :: atomic { !DRAINED }
        :: KILL
        fi
#endif
    :: else
    fi;
#ifdef LEAN_CHAIN
    if
    :: (armed || woken) && (mine > 0 || leaving) ->
        STEP( more = woken || !waiting[me]; waiting[me] = false; armed = false; woken = false );
        if
        :: more -> STEP( more = TAKEABLE )
        :: else
        fi
    :: else
    fi;
#endif
    if
    :: more -> more = false; wake_one(NP, N)
    :: else
    fi;
    if
    :: CONSUMED ->
#ifdef SMALL_FRAMES
        consumed = false
#endif
    :: mine > 0 ->
#ifdef STALL                                            /* one consumer's code waits for the other frames */
        if
        :: atomic { me != NP || ALL_BUT_ONE }
        :: KILL
        fi
#endif
    :: end ->
        atomic {
            CHECK(ALL_CLOSED);
            do
            :: g < NP * NF -> CHECK(!committed[g] || finished[g]); g++
            :: else -> break
            od;
            g = 0; end = false; armed = false; done++;
            goto ended
        }
    :: leaving ->
#ifdef BAD_LEAVE                                        /* passes the wake on only if woken and nothing taken since */
        STEP( woken = woken || (armed && !waiting[me]); waiting[me] = false; armed = false );
        if
        :: woken -> woken = false; wake_one(NP, N)
        :: else
        fi;
#else
        STEP( waiting[me] = false; armed = false );
#if !defined(NO_PASS_ON) && !defined(LEAN_CHAIN)
        wake_one(NP, N);                                /* the one that woke us may have meant another frame */
#endif
#endif
        atomic { leaving = false; done++; goto ended }
    :: else ->
#ifdef BAD_PASS_ON                                      /* woken for nothing, it wakes another before it sleeps again */
        if
        :: woken -> woken = false; wake_one(NP, N)
        :: else
        fi;
#endif
        if
#ifdef BAD_SECOND_LOOK                                  /* without a lock, and only for a committed frame */
        :: atomic { !armed -> waiting[me] = true; armed = true }
            if
            :: atomic { AT_NEXT(COMMITTED) }
            :: atomic { !AT_NEXT(COMMITTED) }
                STEP( bell[me] -> bell[me] = false; armed = false )
            fi
#elif defined(BAD_RECHECK)                              /* sets its flag, and sleeps without a second look */
        :: atomic { !armed -> waiting[me] = true; armed = true }
            STEP( bell[me] -> bell[me] = false; armed = false )
#else
        :: atomic { !armed -> waiting[me] = true; armed = true }    /* full fence, then look again */
#endif
        :: atomic { armed && bell[me] -> bell[me] = false; armed = false; WOKEN(true) }
        :: atomic { armed && MAY_LEAVE -> leaving = true }
        :: KILL
        fi
    fi;
    goto look;

died:
    atomic {
        ORPHANED(C);
        do
        :: g < CAP ->
            if :: user[g] == me + 1 -> user[g] = 0 :: else fi;
            if :: kind[g] == TAKEN && owner[g] == me -> deaths[data[g] - 1]++ :: else fi;
            g++
        :: else -> break
        od;
        mine = 0; s = 0; t = 0; j = 0; g = 0; fix = 0;
        moved = false; skipped = false; armed = false; hit = false; end = false; more = false;
        leaving = false; WOKEN(false);
#ifdef SMALL_FRAMES
        consumed = false;
#endif
#ifdef NO_WAKE_AFTER_SKIP
        quiet = false;
#endif
        dead[me] = true; corpses++
    };
    if
    :: atomic { !dead[me] -> goto alive }               /* a new life in the same participant slot */
    :: atomic { !dead[me] && MAY_LEAVE -> done++ }
    fi;
ended:
}

/* ---- recovery ------------------------------------------------------------------------------------------------ */

#undef KILL
#ifdef REAPER_DIES
#define KILL atomic { budget > 0 -> budget--; goto died }
#else
#define KILL atomic { false -> goto died }
#endif
#define FREE_SLOT STEP( if :: dead[d] -> dead[d] = false; corpses--; done = done + (d < NP) :: else fi )

proctype Reaper(byte me) {
    byte d, t, j, fix;
    bool moved, mistaken, found;

alive:
    do
    :: atomic { corpses > 0 -> do :: dead[d] -> break :: else -> d++ od }
#if REAPERS > 1 && !defined(NO_RECOVERY_LOCK)
        STEP( R == FREE || R == ORPHAN -> R = me + 1 );
#endif
#if REAPERS > 1
        if                                              /* another one was faster: the slot may have a new life */
        :: atomic { dead[d] }
        :: atomic { !dead[d] -> goto recovered }
        :: KILL
        fi;
#endif
reclaim:
        if
        :: d < NP ->
            STEP( P == FREE || P == ORPHAN -> MEND_P; P = me + 1 );
            STEP( t = tail );                           /* may lag; from here to head all stands still under P */
            do
            :: STEP( do
                     :: t < head && !AT(t, CLAIMED, d) -> t = t + size[SLOT(t)]
                     :: else -> break
                     od;
                     if
                     :: t < head -> kind[SLOT(t)] = ABORTED; owner[SLOT(t)] = 0; found = true
                     :: else -> t = 0; break
                     fi )
            od;
            STEP( if :: !mistaken -> closed[d] = true :: else fi; P = FREE )
        :: else ->
            if
            :: atomic { C == FREE -> C = me + 1 }
            :: atomic { C == ORPHAN -> C = me + 1; fix = 1 }
            :: KILL
            fi;
            do
            :: atomic { fix == 1 -> repair_next(); fix = 2 }
            :: atomic { fix == 2 -> repair_counts(); fix = 0 }
            :: atomic { fix == 0 && t > 0 -> store_tail() }
            :: atomic { fix == 0 && t == 0 -> t = tail; break }
            :: KILL
            od;
            do
            :: STEP( do
                     :: t < next && !AT(t, TAKEN, d) -> t = t + size[SLOT(t)]
                     :: else -> break
                     od;
                     if
                     :: t < next ->
                        found = true;
#ifndef BAD_COUNT_LAST
                        deliveries[SLOT(t)]++           /* first: a second delivery never looks like the first one */
#endif
                     :: else -> break
                     fi );
#ifdef MAX_DELIVERIES
               if
               :: deliveries[SLOT(t)] > MAX_DELIVERIES ->       /* kept as a dead letter elsewhere, before this */
                    STEP( kind[SLOT(t)] = FINISHED; owner[SLOT(t)] = 0; finished[data[SLOT(t)] - 1] = true;
                          data[SLOT(t)] = 0; deliveries[SLOT(t)] = 0 );
                    goto settled
               :: else
               fi;
#endif
               STEP( kind[SLOT(t)] = AVAILABLE; owner[SLOT(t)] = 0 );
#ifdef BAD_COUNT_LAST
               STEP( deliveries[SLOT(t)]++ );
#endif
               STEP( redeliver++ );
settled:
               skip
            od;
            t = 0;
#if defined(MAX_DELIVERIES) && !defined(NO_WALK_AFTER_DEAD)
            STEP( prepare_tail() );
            STEP( if :: t > 0 -> store_tail() :: else fi );
#endif
            STEP( moved = false; C = FREE )
        fi;
#ifdef BAD_FREE_EARLY
        FREE_SLOT;
#endif
#ifndef NO_FLAG_DOWN
        STEP( waiting[d] = false );                     /* or a waker would pick the dead one, and wake nobody */
#endif
#ifdef BAD_RING_IF_FOUND
        if :: !found -> goto rung :: else fi;
#endif
        do                                              /* all doorbells, whatever the flags say */
#ifdef BAD_RING_FLAGGED
        :: STEP( if :: waiting[j] -> waiting[j] = false; bell[j] = true :: else fi; j++;
                 if :: j == N -> j = 0; break :: else fi )
#else
        :: STEP( bell[j] = true; j++; if :: j == N -> j = 0; break :: else fi )
#endif
        od;
rung:
#ifndef BAD_FREE_EARLY
        FREE_SLOT;                                      /* last: what a reaper did not get to do is done again */
#endif
recovered:
        atomic { d = 0; mistaken = false; found = false;
#if REAPERS > 1 && !defined(NO_RECOVERY_LOCK)
            R = FREE
#endif
        }
#ifdef RECLAIM_ON_TIMEOUT                               /* slow is taken for dead */
    :: atomic { !timed_out && done < N -> timed_out = true; mistaken = true;
#ifdef RECLAIM_READER
        d = NP;
#endif
        goto reclaim }
#endif
    :: atomic { done == N -> goto ended }
    od;

died:
    atomic {                                            /* it owns no frame: whoever comes next starts over */
        ORPHANED(P); ORPHANED(C); ORPHANED(R);
        d = 0; t = 0; j = 0; fix = 0; moved = false; mistaken = false; found = false
    };
    goto alive;

ended:
    atomic {
        CHECK(tail == head && next == head && redeliver == 0);
        CHECK(claims[head_copy] == finishes[tail_copy] + aborts[tail_copy]);
        do
        :: t < NP * NF -> CHECK(!committed[t] || finished[t]); t++
        :: else -> break
        od
    }
}

init {
    atomic {
#if CRASHES == 1
        if :: budget = 0 :: budget = 1 fi;
#elif CRASHES == 2
        if :: budget = 0 :: budget = 1 :: budget = 2 fi;
#endif
        byte i = 0;
        do
        :: i < NP -> run Producer(i); i++
        :: i >= NP && i < N -> run Consumer(i); i++
        :: i >= N && i < N + REAPERS -> run Reaper(i); i++
        :: i == N + REAPERS -> break
        od
    }
}
