/*
 * Post-copy: the driver's hold is lifted after a small set has moved, and the rest is fetched and pushed while the function
 * runs. The source, stopped, is kept until all has arrived; if it dies before, the function is LOST, and never wrong.
 *
 * There is one migration of one function with one page outside of the small set. Whatever was sent arrives at any later
 * moment, any number of times, as in migration.pml.
 */

/* The rules, by the numbers of their bits. The runner reads names and descriptions here. */
#define ARRIVED_BEFORE_SCRUB 1   /* a commit's clean-up destroys the source only after all has arrived */
#define SCRUB_BEFORE_FINISH  2   /* FINISH waits until the source is destroyed */
#define STOPPED_UNTIL_FINAL  4   /* a host keeps a stopped source until the migration's record is final */
#define WAIT_FOR_PAGE        8   /* an access to a page that hasn't arrived waits for it */
#define ARRIVE_ONCE          16  /* what arrives late does not overwrite a page that has arrived */
#define REST_STOPPED         32  /* only a stopped source hands out the rest */
#define FETCH_NAMED          64  /* a fetch names the instance, so nothing else in its place answers */
#define SAY_LOST             128 /* a function whose source is gone before all has arrived becomes LOST */

#ifndef WITHOUT
#define WITHOUT 0
#endif
#define HAS(rule) (!((WITHOUT) & (rule)))

/* The migration's phase. */
#define PREPARING 0
#define COMMITTED 1
#define ABORTED 2
#define DONE 3
byte phase;
bit held;

/* The instances. The target has the small set when it is READY, and from COMMIT on it runs. */
#define ABSENT 0
#define RUNNING 1
#define STOPPED 2
#define READY 3
byte source = RUNNING, target;
bit died; /* whether the source's machine has */
bit lost; /* whether the fleet says so of the function */

/* The page. It counts the driver's writes, so what it must hold is known. */
#define WRITES 2
#define NOTHING 3 /* what a place reads as that the function is not in */
byte source_page, target_page, written;
bit arrived;
bit sent[4];      /* what has ever been sent as the content of the page */

hidden byte invariant_4, invariant_8;

#define IS_TARGETS (phase == COMMITTED || phase == DONE)
#define SERVES_AT_SOURCE (!IS_TARGETS && !held && source == RUNNING)
#define SERVES_AT_TARGET (IS_TARGETS && !held && !lost && (arrived || !HAS(WAIT_FOR_PAGE)))
#define TAKES (target == READY && phase != ABORTED && (!arrived || !HAS(ARRIVE_ONCE)))

inline take(content) {
	arrived = 1; target_page = content;
	invariant_4 = content == written; /* no write is undone by what arrives, and nothing else's memory is taken for it */
	assert(invariant_4)
}

proctype Protocol() {
end:	do
	/* Hold, stop, the small set, COMMIT or ABORT, and what follows. */
	:: d_step { phase == PREPARING && !held -> held = 1 }
	:: d_step { phase == PREPARING && held && source == RUNNING -> source = STOPPED }
	:: d_step { phase == PREPARING && source == STOPPED && target == ABSENT -> target = READY }
	:: d_step { phase == PREPARING && held && target == READY -> phase = COMMITTED }
	:: d_step { phase == PREPARING -> phase = ABORTED }
	:: d_step { phase != PREPARING && held -> held = 0 }
	:: d_step { phase == ABORTED && target == READY -> target = ABSENT; arrived = 0; target_page = 0 }
	:: d_step { phase == ABORTED && source == STOPPED -> source = RUNNING }
	:: d_step { phase == COMMITTED && source == STOPPED && (arrived || !HAS(ARRIVED_BEFORE_SCRUB)) -> source = ABSENT }
	:: d_step { phase == COMMITTED && (source == ABSENT || !HAS(SCRUB_BEFORE_FINISH)) -> phase = DONE }
	/* The source's host past its deadline. */
	:: d_step { IS_TARGETS && source == STOPPED && (phase == DONE || !HAS(STOPPED_UNTIL_FINAL)) -> source = ABSENT }
	/* The source's machine, at any moment; if the function lived there, that is the end of it. */
	:: d_step { !died -> died = 1; source = ABSENT; if :: !IS_TARGETS -> lost = 1 :: else fi }
	:: d_step { HAS(SAY_LOST) && IS_TARGETS && !arrived && !lost && source == ABSENT ->
		lost = 1;
		invariant_8 = died; /* nothing but a death loses it */
		assert(invariant_8) }
	/* The rest: asked for and pushed, before COMMIT and after it. */
	:: d_step { !arrived && source == STOPPED && !sent[source_page] -> sent[source_page] = 1 }
	:: d_step { !arrived && source == RUNNING && !sent[source_page] && !HAS(REST_STOPPED) -> sent[source_page] = 1 }
	:: d_step { !arrived && source == ABSENT && !sent[NOTHING] && !HAS(FETCH_NAMED) -> sent[NOTHING] = 1 }
	:: d_step { TAKES && sent[0] && (!arrived || target_page != 0) -> take(0) }
	:: d_step { TAKES && sent[1] && (!arrived || target_page != 1) -> take(1) }
	:: d_step { TAKES && sent[2] && (!arrived || target_page != 2) -> take(2) }
	:: d_step { TAKES && sent[NOTHING] && (!arrived || target_page != NOTHING) -> take(NOTHING) }
	od
}

/* Each write reads first what it adds to. */
proctype Driver() {
	do
	:: d_step { SERVES_AT_SOURCE && written < WRITES ->
		invariant_4 = source_page == written;
		assert(invariant_4);
		written++; source_page = written }
	:: d_step { SERVES_AT_TARGET && written < WRITES ->
		invariant_4 = arrived && target_page == written;
		assert(invariant_4);
		written++; target_page = written }
	/* A state in which nothing is left to do, and the driver has neither its answers nor been told, is a stuck one. */
	:: (phase == DONE || phase == ABORTED) && !held && (lost || written == WRITES) -> break
	od
}

init {
	atomic { run Protocol(); run Driver() }
}
