/*
 * Migrations of one function, there and back again: coordinators, etcd, two hosts for the function, one for its driver.
 *
 * Every action below is one atomic step, and any that is enabled may be next. What was ever sent may arrive at any later
 * moment, any number of times: a request isn't a message on its way but an action that stays enabled once somebody
 * could have sent it. A request that would change nothing is not enabled, so a state in which nothing is left to do is
 * an end, and with ENDING=1 it must be a good one.
 *
 * docs/model.md says what is modelled and what isn't. `spin -a -DWITHOUT=FENCE+LIFT_OWN` takes rules away.
 */

/* The rules, by the numbers of their bits. The runner reads names and descriptions here. */
#define RECORD_AT_COMMIT      1          /* COMMIT compares the record as still PREPARING */
#define RECORD_AT_ABORT       2          /* ABORT compares the record as still PREPARING */
#define LOCK_AT_BEGIN         4          /* BEGIN compares the function's lock as absent */
#define SLOT_AT_BEGIN         8          /* BEGIN compares the target slot as absent */
#define FUNCTION_AT_BEGIN     16         /* BEGIN compares the function's record as planned with */
#define FUNCTION_AT_COMMIT    32         /* COMMIT compares the function's record as planned with */
#define READ_BACK             64         /* a COMMIT without an answer is read back before anything else */
#define HELD_BEFORE_COMMIT    128        /* COMMIT waits until the driver's host holds the entry */
#define COPIED_BEFORE_COMMIT  256        /* COMMIT waits until the target has all the state */
#define COMMIT_BEFORE_APPLY   512        /* an entry is applied and lifted only after COMMIT */
#define DONE_BEFORE_FINISH    1024       /* FINISH waits until every host has acknowledged its consequences */
#define FENCE                 2048       /* a host refuses an attempt lower than the highest that it has seen */
#define ENDED                 4096       /* a host refuses preparatory requests of an attempt that has ended there */
#define RESUME_OWN            8192       /* a resume ends only a stop of its own attempt */
#define LIFT_OWN              16384      /* a lift ends only a hold of its own attempt */
#define DESTROY_OWN           32768      /* the clean-up of an abort destroys only an instance of its own attempt */
#define DESTROY_OLD           65536      /* the clean-up of a commit destroys only an instance of the old generation */
#define IMPORT_OWN            131072     /* an import fills only an instance of its own attempt */
#define COPY_STOPPED          262144     /* the last difference leaves a source that the same attempt has stopped */
#define ENTRY_FORWARD         524288     /* an entry in a table never goes back */
#define ACCESS_GENERATION     1048576    /* an instance takes accesses of its own generation only */
#define SEQUENCE              2097152    /* an instance takes each access once, in its turn */
#define RESOLVE_SAME          4194304    /* a host resolves a wait only by the decision of the migration it waits for */
#define RESOLVE_BY_RECORD     8388608    /* an instance resolves by the function's record, not by the phase */
#define STOPPED_UNTIL_FINAL   16777216   /* a host keeps a stopped source until the migration's record is final */
#define RESOLVE_OWN_HOLD      33554432   /* a host's resolution ends only the hold whose migration it asked about */
#define LOCK_AT_ATTACH        67108864   /* attaching or detaching a driver compares the function's lock as absent */
#define TARGET_AT_COMMIT      134217728  /* COMMIT compares the target host as registered with the same incarnation */
#define HOSTS_RESOLVE         268435456  /* a host resolves whatever waits past its deadline */

#ifndef WITHOUT
#define WITHOUT 0
#endif
#define HAS(rule) (!((WITHOUT) & (rule)))

#ifndef MIGRATIONS
#define MIGRATIONS 2
#endif
#ifndef SESSIONS
#define SESSIONS 3
#endif
#define ACCESSES 2
/* Where the driver is: 2 is a host of its own; 0 or 1 is that of the odd or even generations, with one fence for both. */
#ifndef D
#define D 2
#endif
/* 1: whoever acts may cease to, for good, at any moment, and what is left must come to a good end. */
#ifndef ENDING
#define ENDING 0
#endif
/* 1: another driver may be attached and detached. */
#ifndef ATTACHING
#define ATTACHING 0
#endif
/* 1: the machine of a host that isn't the home may be started anew, once. */
#ifndef RESTARTING
#define RESTARTING 0
#endif

/* 0: what is left over after a migration's end (invariant 8) is not asked for. */
#ifndef LEFTOVERS
#define LEFTOVERS 1
#endif

/* Phases of a migration. */
#define NONE 0
#define PREPARING 1
#define COMMITTED 2
#define ABORTING 3
#define DONE 4
#define ABORTED 5

/* States of an instance. */
#define ABSENT 0
#define RESUMING 1
#define READY 2 /* it has all its state, and waits for the proof that it is the home */
#define RUNNING 3
#define STOPPED 4

/* Who still acts. */
#define FREE 0 /* everybody, and everything may happen */
#define CALM 1 /* no new migration, no lease that ends, nothing late; coordinators and hosts go on */
#define DESERTED 2 /* the same, and every coordinator is dead */

/* There and back: an odd generation lives on host 0, an even one on host 1. */
#define HOST_OF(generation) (1 - ((generation) & 1))

/* --- etcd --- */
typedef Migration {
	unsigned phase : 3;
	unsigned source : 3;     /* generation of the source; the target's is the next */
	bit owned;               /* whether it has an owner key, so that a coordinator that lives drives it */
	bit deposed;             /* whether a former owner may act still */
	bit held, copied;        /* what hosts have acknowledged to those who drive it */
	bit lifted, resumed, removed;
	bit has_second;          /* whether the plan has an entry of the second driver */
	bit target_is_gone;      /* whether the target's machine was started anew since BEGIN */
}
Migration migration[MIGRATIONS + 1]; /* by attempt; attempt 0 made the function */
unsigned home : 3 = 1;   /* generation in the function's record, and in the driver's entry */
unsigned second : 3;     /* generation in the entry of the second driver; 0 for none */
unsigned lock : 2;       /* the attempt that has the function's lock; 0 for none */
bit slot[2];             /* whether the slot on a host is taken or reserved */
unsigned sessions : 2 = 1; /* how many there were; the last one's lease doesn't end */

/* --- hosts: a fence and an instance each; and the driver's table, with its one entry --- */
typedef Host {
	unsigned fence : 2;
	bit ended;
	unsigned over : 4;       /* without the fence: each attempt that has ended here, as a set of bits */
	unsigned generation : 3;
	unsigned made_by : 2;
	unsigned state : 3;
	unsigned stopped_by : 2;
	unsigned last : 2;       /* sequence of the last access that took effect */
	unsigned asked : 2;      /* the migration whose decision the host has read, to resolve its instance by */
	unsigned read : 3;       /* generation in the function's record, as it was read then */
}
Host host[3];
unsigned entry : 3 = 1;  /* generation that the entry names */
unsigned hold : 2;       /* the attempt whose hold it has; 0 for none */
unsigned asked : 2;      /* the migration whose decision the host has read, to resolve a hold by */
unsigned read : 3;       /* generation in the entry in etcd, as it was read then */

/* --- what nobody but the checker knows --- */
unsigned applied : 2;    /* accesses that took effect anywhere; their answers are on the way */
byte highest[3];         /* attempt that any request has named on a host */
unsigned mode : 2;
bit restarted, driver_restarted;

hidden byte invariant_1, invariant_2, invariant_3, invariant_4, invariant_5, invariant_8, invariant_9;

#define DECIDED(m) (migration[m].phase >= COMMITTED)
#define IS_COMMITTED(m) (migration[m].phase == COMMITTED || migration[m].phase == DONE)
#define IS_ABORTED(m) (migration[m].phase == ABORTING || migration[m].phase == ABORTED)
#define IS_FINAL(m) (migration[m].phase == DONE || migration[m].phase == ABORTED)
#define IS_ACTIVE(m) (migration[m].phase >= PREPARING && migration[m].phase <= ABORTING)
#if MIGRATIONS == 2
#define ANY_ACTIVE (IS_ACTIVE(1) || IS_ACTIVE(2))
#else
#define ANY_ACTIVE (IS_ACTIVE(1) || IS_ACTIVE(2) || IS_ACTIVE(3))
#endif
#define OLD(m) (migration[m].source)
#define NEW(m) (migration[m].source + 1)
#define S HOST_OF(OLD(m))
#define T HOST_OF(NEW(m))

#define SERVES_RIGHTLY(h) (host[h].state != RUNNING || host[h].generation == home)
#define HAS_ALL_EFFECTS(h) (host[h].state != RUNNING || host[h].last == applied)
#define HOME host[HOST_OF(home)]
#define AWAY host[1 - HOST_OF(home)]
/* What must always hold, by its number in design.md: 3, 5 and 9 are asserted where they could break, 7 is ENDING. */
inline check() {
	/* Stricter: whatever runs is the instance that etcd names as home, and that instance exists, with all its state. */
	invariant_1 = SERVES_RIGHTLY(0) && SERVES_RIGHTLY(1) && HOME.generation == home && HOME.state >= READY;
	assert(invariant_1);
	/* A driver's host that has read the entry at its start may be behind COMMIT until its watch has told it. */
	invariant_2 = (hold || entry == home || driver_restarted) && (!second || second == home);
	assert(invariant_2);
	/* What had an effect is in the home's state: none is lost. None is repeated: see access(). */
	invariant_4 = HAS_ALL_EFFECTS(0) && HAS_ALL_EFFECTS(1);
	assert(invariant_4);
	/* On a machine that has lost its memory a late request may leave something, which goes at its deadline. */
	invariant_8 = !LEFTOVERS || restarted || ANY_ACTIVE || !lock && !hold && AWAY.state == ABSENT && !slot[1 - HOST_OF(home)] &&
		slot[HOST_OF(home)] && (HOME.state == RUNNING || HOME.state == READY);
	assert(invariant_8)
}

/* --- a host's fence --- */
#define IS_OVER(h) (HAS(ENDED) && (HAS(FENCE) && host[h].fence == m && host[h].ended || (host[h].over >> m) & 1))
#define MAY_PREPARE(h) ((m >= host[h].fence || !HAS(FENCE)) && !IS_OVER(h))
#define MAY_CONCLUDE(h) (m >= host[h].fence || !HAS(FENCE))
#define IS_NEW(h) (host[h].fence != m)
#define IS_NOT_ENDED(h) (host[h].fence != m || !host[h].ended)

inline see(h, attempt) {
	invariant_9 = attempt >= highest[h] || !HAS(FENCE); /* it is the fence, so it can't be asked for without */
	assert(invariant_9);
	if :: attempt > highest[h] -> highest[h] = attempt :: else fi
}

inline prepare(h) {
	see(h, m);
	if :: IS_NEW(h) -> host[h].fence = m; host[h].ended = 0 :: else fi
}

inline remember(h, attempt) { if :: HAS(FENCE) -> skip :: else -> host[h].over = host[h].over | (1 << attempt) fi }

inline conclude(h) {
	see(h, m);
	host[h].fence = m; host[h].ended = 1;
	remember(h, m)
}

/* What a host finds out on its own ends an attempt there, unless it has seen a higher one. */
inline end_attempt(h, attempt) {
	if
	:: attempt >= host[h].fence -> host[h].fence = attempt; host[h].ended = 1; highest[h] = attempt
	:: else
	fi;
	remember(h, attempt)
}

/* --- a host's instance --- */
inline become_running(h) { host[h].state = RUNNING; host[h].stopped_by = 0 }

inline forget_asking(h) { host[h].asked = 0; host[h].read = 0 }

inline remove(h) {
	host[h].generation = 0; host[h].made_by = 0; host[h].state = ABSENT; host[h].stopped_by = 0; host[h].last = 0;
	forget_asking(h)
}

/* It waits for the migration that stopped it, else for the one that made it. */
#define IS_UNPROVEN(h) (host[h].state == RESUMING || host[h].state == READY)
#define WAITS(h) (IS_UNPROVEN(h) || host[h].state == STOPPED)
#define WAITS_FOR_M(h) (IS_UNPROVEN(h) && host[h].made_by == m || host[h].state == STOPPED && host[h].stopped_by == m)

/* --- the driver's table --- */
inline put_entry(generation) {
	if :: entry < generation || !HAS(ENTRY_FORWARD) -> entry = generation :: else fi;
	/* A hold of a generation that is over is lifted. */
	if :: hold && migration[hold].source < entry -> hold = 0 :: else fi
}

/* --- the requests of attempt m: whether a host takes one, whether it would change anything, and what it does --- */
#define PLACES_HOLD (MAY_PREPARE(D) && entry == OLD(m))
#define IMPORTS (MAY_PREPARE(T) && MAY_PREPARE(S) && host[T].generation == NEW(m) && host[T].state == RESUMING && \
	(host[T].made_by == m || !HAS(IMPORT_OWN)) && host[S].generation == OLD(m) && \
	(host[S].state == STOPPED && host[S].stopped_by == m || host[S].state >= READY && !HAS(COPY_STOPPED)))
#define HAS_OLD (host[S].state != ABSENT && (host[S].generation == OLD(m) || !HAS(DESTROY_OLD)))
#define HAS_OWN (host[T].generation == NEW(m) && (host[T].made_by == m || !HAS(DESTROY_OWN)))
#define HAS_STOPPED (host[S].generation == OLD(m) && host[S].state == STOPPED && \
	(host[S].stopped_by == m || !HAS(RESUME_OWN)))
#define HAS_HOLD(own) (hold == m || hold && !HAS(own))

inline create_at_target() {
	prepare(T);
	if
	:: host[T].state == ABSENT -> host[T].generation = NEW(m); host[T].made_by = m; host[T].state = RESUMING
	:: else
	fi;
	check()
}

inline place_hold() { prepare(D); hold = m; check() }

/* An instance that still waited for the proof of the move before has it by this. */
inline stop_source() {
	prepare(S);
	if
	:: host[S].generation == OLD(m) -> host[S].state = STOPPED; host[S].stopped_by = m
	:: else
	fi;
	check()
}

/* ImportState at the target, and the end of the ExportState that it calls at the source. */
inline import_state() {
	prepare(T); prepare(S);
	host[T].state = READY; host[T].last = host[S].last;
	check()
}

inline update_table() {
	if :: MAY_CONCLUDE(D) -> conclude(D); put_entry(NEW(m)) :: else fi;
	check()
}

inline destroy_source() {
	if
	:: MAY_CONCLUDE(S) ->
		conclude(S);
		if :: HAS_OLD -> remove(S) :: else fi
	:: else
	fi;
	check()
}

inline destroy_target() {
	if
	:: MAY_CONCLUDE(T) ->
		conclude(T);
		if :: HAS_OWN -> remove(T) :: else fi
	:: else
	fi;
	check()
}

inline resume_source() {
	if
	:: MAY_CONCLUDE(S) ->
		conclude(S);
		if :: HAS_STOPPED -> become_running(S) :: else fi
	:: else
	fi;
	check()
}

inline lift_hold() {
	if
	:: MAY_CONCLUDE(D) ->
		conclude(D);
		if :: HAS_HOLD(LIFT_OWN) -> hold = 0 :: else fi
	:: else
	fi;
	check()
}

/* Consequences are sent by those who have read the decision: then they are true, whoever sends them and however late. */
#define MAY_APPLY (IS_COMMITTED(m) || !HAS(COMMIT_BEFORE_APPLY) && migration[m].phase == PREPARING && hold == m && \
	host[T].state == READY && host[T].made_by == m)
#define MAY_UNDO (IS_ABORTED(m) || !HAS(READ_BACK) && migration[m].phase == COMMITTED)

/* ABORT: of the owner, of one who was it, of a host; and a cancel, which compares no owner. */
inline abort() {
	invariant_5 = migration[m].phase == PREPARING;
	assert(invariant_5);
	migration[m].phase = ABORTING
}

/* What was ever sent arrives at any later moment, any number of times, and nobody hears of the answer. */
proctype Late(byte m) {
end:	do
	:: d_step { mode == FREE && migration[m].phase && MAY_PREPARE(T) && (IS_NEW(T) || host[T].state == ABSENT) ->
		create_at_target() }
	:: d_step { mode == FREE && migration[m].phase && PLACES_HOLD && (IS_NEW(D) || hold != m) -> place_hold() }
	:: d_step { mode == FREE && migration[m].phase && MAY_PREPARE(S) &&
		(IS_NEW(S) || host[S].generation == OLD(m) && host[S].stopped_by != m) -> stop_source() }
	:: d_step { mode == FREE && migration[m].phase && IMPORTS -> import_state() }
	:: d_step { mode == FREE && MAY_APPLY && MAY_CONCLUDE(D) &&
		(IS_NOT_ENDED(D) || entry < NEW(m) || entry != NEW(m) && !HAS(ENTRY_FORWARD)) -> update_table() }
	:: d_step { mode == FREE && IS_COMMITTED(m) && MAY_CONCLUDE(S) && (IS_NOT_ENDED(S) || HAS_OLD) -> destroy_source() }
	:: d_step { mode == FREE && MAY_UNDO && MAY_CONCLUDE(T) && (IS_NOT_ENDED(T) || HAS_OWN) -> destroy_target() }
	:: d_step { mode == FREE && MAY_UNDO && MAY_CONCLUDE(S) && (IS_NOT_ENDED(S) || HAS_STOPPED) -> resume_source() }
	:: d_step { mode != DESERTED && (migration[m].phase == PREPARING ||
		migration[m].phase == COMMITTED && !HAS(RECORD_AT_ABORT)) -> abort() }
	:: d_step { mode == FREE && MAY_UNDO && MAY_CONCLUDE(D) && (IS_NOT_ENDED(D) || HAS_HOLD(LIFT_OWN)) -> lift_hold() }
	od
}

/* --- coordinators ---
 * No transaction of theirs compares the owner key, so who sends it makes no difference: a former owner goes on beside the
 * one that has adopted, and what hosts have acknowledged to either counts, until the former owner ceases.
 */
#define ACTS (mode == FREE || mode == CALM && migration[m].owned)
#define MAY_BEGIN (mode == FREE && migration[m].phase == NONE && migration[m - 1].phase != NONE && (!lock || !HAS(LOCK_AT_BEGIN)))
#define IS_PREPARED ((migration[m].held || !HAS(HELD_BEFORE_COMMIT)) && (migration[m].copied || !HAS(COPIED_BEFORE_COMMIT)))
#define IS_AS_PLANNED (home == OLD(m) && (second != 0) == migration[m].has_second)

inline begin(generation) {
	migration[m].owned = 1;
	migration[m].phase = PREPARING; migration[m].source = generation;
	migration[m].has_second = second != 0;
	lock = m; slot[T] = 1;
	check()
}

inline forget_answers() {
	migration[m].held = 0; migration[m].copied = 0;
	migration[m].lifted = 0; migration[m].resumed = 0; migration[m].removed = 0
}

inline finish(final, freed) {
	migration[m].phase = final; migration[m].owned = 0; migration[m].deposed = 0;
	lock = 0; slot[freed] = 0;
	forget_answers();
	check()
}

proctype Coordinators(byte m) {
end:	do
	/* BEGIN. A plan may be old. */
	:: d_step { MAY_BEGIN && (!slot[HOST_OF(home + 1)] || !HAS(SLOT_AT_BEGIN)) -> begin(home) }
	:: d_step { MAY_BEGIN && (!slot[HOST_OF(home)] || !HAS(SLOT_AT_BEGIN)) && home > 1 && !HAS(FUNCTION_AT_BEGIN) ->
		begin(home - 1) }
	/* The owner's lease ends, and it may not know. What it still sends is in Late, what it still writes is below. */
	:: d_step { mode == FREE && migration[m].owned && sessions < SESSIONS ->
		migration[m].owned = 0; migration[m].deposed = 1; sessions++ }
	:: d_step { mode == FREE && migration[m].deposed -> migration[m].deposed = 0; forget_answers() }
	/* One that lives adopts, and goes on or aborts. */
	:: d_step { mode != DESERTED && IS_ACTIVE(m) && !migration[m].owned -> migration[m].owned = 1 }
	/* Requests with an answer. */
	:: d_step { mode == FREE && migration[m].phase == PREPARING && !migration[m].held && PLACES_HOLD ->
		place_hold(); migration[m].held = 1 }
	:: d_step { mode == FREE && migration[m].phase == PREPARING && !migration[m].copied && IMPORTS ->
		import_state(); migration[m].copied = 1 }
	:: d_step { mode == FREE && migration[m].phase == PREPARING && !migration[m].copied && MAY_PREPARE(T) &&
		host[T].state == READY && host[T].made_by == m -> prepare(T); migration[m].copied = 1 }
	:: d_step { ACTS && migration[m].phase == COMMITTED && !migration[m].lifted -> update_table(); migration[m].lifted = 1 }
	:: d_step { ACTS && migration[m].phase == COMMITTED && !migration[m].removed ->
		destroy_source(); migration[m].removed = 1 }
	:: d_step { ACTS && migration[m].phase == ABORTING && !migration[m].removed ->
		destroy_target(); migration[m].removed = 1 }
	:: d_step { ACTS && migration[m].phase == ABORTING && !migration[m].resumed ->
		resume_source(); migration[m].resumed = 1 }
	:: d_step { ACTS && migration[m].phase == ABORTING && !migration[m].lifted -> lift_hold(); migration[m].lifted = 1 }
	/* COMMIT. */
	:: d_step { ACTS && IS_ACTIVE(m) && migration[m].phase != COMMITTED && IS_PREPARED &&
		(migration[m].phase == PREPARING || !HAS(RECORD_AT_COMMIT)) &&
		(IS_AS_PLANNED || !HAS(FUNCTION_AT_COMMIT)) && (!migration[m].target_is_gone || !HAS(TARGET_AT_COMMIT)) ->
		invariant_5 = migration[m].phase == PREPARING;
		assert(invariant_5);
		migration[m].phase = COMMITTED; home = NEW(m);
		if :: migration[m].has_second -> second = home :: else fi;
		forget_answers();
		check() }
	/* FINISH. */
	:: d_step { ACTS && migration[m].phase == COMMITTED &&
		(migration[m].lifted && migration[m].removed || !HAS(DONE_BEFORE_FINISH)) -> finish(DONE, S) }
	:: d_step { ACTS && migration[m].phase == ABORTING &&
		(migration[m].lifted && migration[m].removed && migration[m].resumed || !HAS(DONE_BEFORE_FINISH)) ->
		finish(ABORTED, T) }
	od
}

/* --- what hosts do on their own, at any moment, since any moment may be past a deadline --- */

/* They read decision and record in etcd, and act at some later moment. */
#define IS_HOME(h) (HAS(RESOLVE_BY_RECORD) && host[h].generation == host[h].read || \
	!HAS(RESOLVE_BY_RECORD) && IS_COMMITTED(m) == (host[h].generation == NEW(m)))
/* A target with all of its state isn't ended by an abort alone: who undoes the migration looks at the source first. */
#define IS_LEFT_ALONE(h, recorded) (host[h].state == READY && (recorded) < host[h].generation)
#define ASKS(h) (HAS(HOSTS_RESOLVE) && WAITS_FOR_M(h) && DECIDED(m) && !host[h].asked && !IS_LEFT_ALONE(h, home) && \
	(host[h].generation == home || host[h].state != STOPPED || IS_FINAL(m) || !HAS(STOPPED_UNTIL_FINAL)))
#define MAY_RESOLVE(h) (WAITS(h) && (WAITS_FOR_M(h) || !HAS(RESOLVE_SAME)))

inline resolve_instance(h) {
	if
	:: MAY_RESOLVE(h) && (IS_HOME(h) || !IS_LEFT_ALONE(h, host[h].read)) ->
		if
		:: host[h].state == STOPPED -> end_attempt(h, host[h].stopped_by)
		:: else -> end_attempt(h, host[h].made_by)
		fi;
		if
		:: IS_HOME(h) -> become_running(h)
		:: else -> remove(h)
		fi
	:: else
	fi;
	forget_asking(h);
	check()
}

proctype Resolvers(byte m) {
end:	do
	:: d_step { ASKS(0) -> host[0].asked = m; host[0].read = home }
	:: d_step { ASKS(1) -> host[1].asked = m; host[1].read = home }
	:: d_step { host[0].asked == m -> resolve_instance(0) }
	:: d_step { host[1].asked == m -> resolve_instance(1) }
	:: d_step { HAS(HOSTS_RESOLVE) && hold == m && DECIDED(m) && !asked -> asked = m; read = home }
	:: d_step { asked == m ->
		end_attempt(D, m);
		put_entry(read);
		if :: HAS_HOLD(RESOLVE_OWN_HOLD) -> hold = 0 :: else fi;
		asked = 0; read = 0;
		check() }
	/* What waits for a migration that is nobody's aborts it. */
	:: d_step { HAS(HOSTS_RESOLVE) && (mode == DESERTED || !migration[m].owned) && migration[m].phase == PREPARING &&
		(hold == m || WAITS_FOR_M(0) || WAITS_FOR_M(1)) -> abort() }
	od
}

/* The watch on the entry in etcd: each value, as late as it may be. */
proctype Watch() {
end:	do
	:: d_step { entry < home -> put_entry(entry + 1); check() }
	od
}

/* --- the driver: an access leaves when the entry isn't held, and what has left may arrive long after --- */
#define ARRIVES(generation_named) ((mode == FREE || !hold && entry == (generation_named)) && entry >= (generation_named) && \
	TAKES(HOST_OF(generation_named), generation_named))
#define TAKES(h, named) (host[h].state != ABSENT && (host[h].generation == (named) || !HAS(ACCESS_GENERATION)) && \
	(host[h].state == READY || host[h].state == RUNNING && (host[h].last < ACCESSES || !HAS(SEQUENCE))))

inline access(h, named) {
	invariant_3 = host[h].generation == (named);
	assert(invariant_3);
	/* It names this generation as the home, and so proves the commit. */
	if :: host[h].state == READY -> end_attempt(h, host[h].made_by); become_running(h) :: else fi;
	check();
	if
	:: host[h].last < ACCESSES && (host[h].last == 0 || HAS(SEQUENCE)) -> host[h].last++; applied = host[h].last
	:: else -> invariant_4 = HAS(SEQUENCE); assert(invariant_4) /* the first access once more */
	fi
}

#define IS_RESOLVED(h) (host[h].state != RESUMING && (host[h].state != STOPPED || host[h].generation != home))
#define ENDS_WELL (applied == ACCESSES && !hold && entry == home && IS_RESOLVED(0) && IS_RESOLVED(1) && \
	(mode == DESERTED || !ANY_ACTIVE))

proctype Driver() {
#if !ENDING
end:
#endif
	do
	:: d_step { ARRIVES(1) -> access(HOST_OF(1), 1) }
	:: d_step { ARRIVES(2) -> access(HOST_OF(2), 2) }
	:: d_step { ARRIVES(3) -> access(HOST_OF(3), 3) }
#if MIGRATIONS == 3
	:: d_step { ARRIVES(4) -> access(HOST_OF(4), 4) }
#endif
#if ENDING
	/* A state in which nobody can do anything, and this process hasn't ended, is a stuck one. */
	:: mode == FREE -> mode = CALM
	:: mode == FREE -> mode = DESERTED
	:: mode != FREE && ENDS_WELL -> break
#endif
	od
}

#if ATTACHING
proctype Attachments() {
end:	do
	:: d_step { mode == FREE && !second && (!lock || !HAS(LOCK_AT_ATTACH)) -> second = home }
	:: d_step { mode == FREE && second && (!lock || !HAS(LOCK_AT_ATTACH)) -> second = 0 }
	od
}
#endif

#if RESTARTING
/* A machine that is started anew has no instances, no holds and no fences, and reads its drivers' entries in etcd. */
inline lose_memory(h) {
	host[h].fence = 0; host[h].ended = 0; host[h].over = 0; highest[h] = 0;
	forget_asking(h);
	restarted = 1
}

inline lose_target(m) {
	if :: migration[m].phase == PREPARING -> migration[m].target_is_gone = 1 :: else fi
}

proctype Machines() {
end:	do
	:: d_step { mode == FREE && !restarted ->
		remove(1 - HOST_OF(home));
		lose_memory(1 - HOST_OF(home));
		lose_target(1); lose_target(2) }
	:: d_step { mode == FREE && !restarted ->
		lose_memory(D);
		hold = 0; entry = home; asked = 0; read = 0; driver_restarted = 1 }
	od
}
#endif

init {
	byte n;
	atomic {
		host[0].generation = 1; host[0].state = RUNNING; host[0].ended = 1;
		slot[0] = 1;
		migration[0].phase = DONE;
		for (n : 1 .. MIGRATIONS) { run Coordinators(n); run Late(n); run Resolvers(n) }
		run Watch(); run Driver();
#if ATTACHING
		run Attachments();
#endif
#if RESTARTING
		run Machines();
#endif
		n = 0
	}
}
