/*
 * A group: two functions that move together, and two drivers, each on a host of its own and attached to both functions.
 *
 * There is one migration, and what migration.pml shows is taken as given: the fence, the names and the lock aren't looked
 * at again. The actions are of the same kind as there: any that is enabled may be next, and stays enabled.
 */

/* The rules, by the numbers of their bits. The runner reads names and descriptions here. */
#define COMMIT_TOGETHER       1   /* one COMMIT changes the records and the entries of all functions of the group */
#define ABORT_TOGETHER        2   /* one record decides for all functions of the group */
#define LIFT_TOGETHER         4   /* UpdateTable swaps in and lifts all entries of a driver by one swap */
#define FOLLOW_TOGETHER       8   /* the watch swaps in what one transaction changed by one swap */
#define HELD_BEFORE_COMMIT    16  /* COMMIT waits until every driver's host holds all its entries */
#define COPIED_BEFORE_COMMIT  32  /* COMMIT waits until every target has all the state */
#define COPY_STOPPED          64  /* the last difference leaves a stopped source */
#define RESOLVE_TOGETHER      128 /* a host resolves all holds of a migration by one swap of each driver's table */
#define ENTRY_AT_RESOLUTION   256 /* a host resolves a hold by the entry in etcd */

#ifndef WITHOUT
#define WITHOUT 0
#endif
#define HAS(rule) (!((WITHOUT) & (rule)))

/* Where a function is decided: with its group, or, without the rule, alone. */
#define PREPARING 0
#define COMMITTED 1
#define ABORTED 2
byte phase[2];

/* A function's two instances. */
#define ABSENT 0
#define READY 1
#define RUNNING 2
#define STOPPED 3
byte source[2] = RUNNING;
byte target[2];

/* Entries by driver and function, at 2 * driver + function: whether it names the target, and whether it is held. */
bit moved[4], held[4];
bit acknowledged[2]; /* by driver: its host holds all entries */
bit has_seen[2];     /* by driver: an access of it took effect at a target */

hidden byte invariant_1, invariant_2, invariant_5, invariant_6;

#define IS_HOME(f) (phase[f] == COMMITTED)
#define IS_RIGHT(f) (source[f] != RUNNING || !IS_HOME(f)) && (target[f] != RUNNING || IS_HOME(f))
#define FOLLOWS(d, f) (held[2 * d + f] || moved[2 * d + f] == IS_HOME(f))
/* Whoever looks at a table sees entries that are held, too. */
#define IS_HALF(d) (moved[2 * d] != moved[2 * d + 1])

inline check() {
	invariant_1 = IS_RIGHT(0) && IS_RIGHT(1);
	assert(invariant_1);
	invariant_2 = FOLLOWS(0, 0) && FOLLOWS(0, 1) && FOLLOWS(1, 0) && FOLLOWS(1, 1);
	assert(invariant_2);
	invariant_5 = phase[0] + phase[1] != COMMITTED + ABORTED; /* one function committed, the other aborted */
	assert(invariant_5);
	invariant_6 = !IS_HALF(0) && !IS_HALF(1);
	assert(invariant_6)
}

/* --- instances --- */
#define COPIED(f) (target[f] != ABSENT || !HAS(COPIED_BEFORE_COMMIT))
#define CAN_COMMIT (COPIED(0) && COPIED(1) && (acknowledged[0] && acknowledged[1] || !HAS(HELD_BEFORE_COMMIT)))

proctype Instance(byte f) {
end:	do
	:: d_step { phase[f] == PREPARING && source[f] == RUNNING -> source[f] = STOPPED }
	:: d_step { phase[f] == PREPARING && target[f] == ABSENT && (source[f] == STOPPED || !HAS(COPY_STOPPED)) ->
		target[f] = READY }
	:: d_step { phase[f] == ABORTED && source[f] == STOPPED -> source[f] = RUNNING; check() }
	:: d_step { phase[f] == ABORTED && target[f] != ABSENT -> target[f] = ABSENT; check() }
	:: d_step { phase[f] == COMMITTED && source[f] == STOPPED -> source[f] = ABSENT }
	:: d_step { phase[f] == COMMITTED && target[f] == READY -> target[f] = RUNNING; check() }
	/* COMMIT and ABORT; without a record for both, each function has its own. */
	:: d_step { phase[f] == PREPARING && CAN_COMMIT ->
		if
		:: HAS(COMMIT_TOGETHER) -> phase[0] = COMMITTED; phase[1] = COMMITTED
		:: else -> phase[f] = COMMITTED
		fi;
		check() }
	:: d_step { phase[f] == PREPARING ->
		if
		:: HAS(ABORT_TOGETHER) -> phase[0] = ABORTED; phase[1] = ABORTED
		:: else -> phase[f] = ABORTED
		fi;
		check() }
	od
}

/* --- drivers and their hosts --- */
#define E(f) (2 * d + f)
#define DECIDED (phase[0] != PREPARING && phase[1] != PREPARING)
#define ANY_HELD (held[E(0)] || held[E(1)])
#define IS_BEHIND(f) (IS_HOME(f) && (!moved[E(f)] || held[E(f)]))
#define SERVES(f) (!held[E(f)] && (moved[E(f)] && target[f] >= READY || !moved[E(f)] && source[f] == RUNNING))

inline take(f) { moved[E(f)] = IS_HOME(f); held[E(f)] = 0 }

inline resolve(f) {
	if
	:: held[E(f)] && HAS(ENTRY_AT_RESOLUTION) -> take(f)
	:: else -> held[E(f)] = 0
	fi
}

inline access(f) {
	/* A target has a driver's access only after it has seen the whole group there; a source never has one after that. */
	invariant_6 = moved[E(f)] || !has_seen[d];
	assert(invariant_6);
	if :: moved[E(f)] -> target[f] = RUNNING; has_seen[d] = 1 :: else fi;
	check()
}

proctype DriverHost(byte d) {
	do
	/* PlaceHold, once: a late one finds that the attempt has ended here. */
	:: d_step { phase[0] == PREPARING && phase[1] == PREPARING && !acknowledged[d] ->
		held[E(0)] = 1; held[E(1)] = 1; acknowledged[d] = 1; check() }
	/* UpdateTable(lift). */
	:: d_step { HAS(LIFT_TOGETHER) && (IS_BEHIND(0) || IS_BEHIND(1)) && IS_HOME(0) && IS_HOME(1) -> take(0); take(1); check() }
	:: d_step { !HAS(LIFT_TOGETHER) && IS_BEHIND(0) -> take(0); check() }
	:: d_step { !HAS(LIFT_TOGETHER) && IS_BEHIND(1) -> take(1); check() }
	/* The watch. */
	:: d_step { HAS(FOLLOW_TOGETHER) && IS_BEHIND(0) && IS_BEHIND(1) -> take(0); take(1); check() }
	:: d_step { !HAS(FOLLOW_TOGETHER) && IS_BEHIND(0) -> take(0); check() }
	/* LiftHold goes entry by entry: it moves none. */
	:: d_step { phase[0] == ABORTED && held[E(0)] -> held[E(0)] = 0; check() }
	:: d_step { phase[1] == ABORTED && held[E(1)] -> held[E(1)] = 0; check() }
	/* The resolution of holds past their deadline. */
	:: d_step { HAS(RESOLVE_TOGETHER) && DECIDED && ANY_HELD -> resolve(0); resolve(1); check() }
	:: d_step { !HAS(RESOLVE_TOGETHER) && phase[0] != PREPARING && held[E(0)] -> resolve(0); check() }
	:: d_step { !HAS(RESOLVE_TOGETHER) && phase[1] != PREPARING && held[E(1)] -> resolve(1); check() }
	/* Its accesses. */
	:: d_step { SERVES(0) && (moved[E(0)] && (target[0] == READY || !has_seen[d]) || !moved[E(0)] && has_seen[d]) -> access(0) }
	:: d_step { SERVES(1) && (moved[E(1)] && (target[1] == READY || !has_seen[d]) || !moved[E(1)] && has_seen[d]) -> access(1) }
	/* A state in which nothing is left to do, and a driver waits, is a stuck one. */
	:: DECIDED && !ANY_HELD && moved[E(0)] == IS_HOME(0) && moved[E(1)] == IS_HOME(1) -> break
	od
}

init {
	atomic { run Instance(0); run Instance(1); run DriverHost(0); run DriverHost(1) }
}
