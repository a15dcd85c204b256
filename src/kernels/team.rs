//! Threads for a forward pass.
//!
//! A forward pass is hundreds of short steps, each some items of work that do not depend on each other. Handing each step to a
//! general thread pool would cost more than some of the steps, so a [`Pool`] has threads that do nothing else: the calling
//! thread leads ([`Pool::region`]) and opens a step with [`Team::items`] and its relatives, and the others follow, looking for
//! open steps.
//!
//! Nobody waits for a thread that has not begun. Every thread, the leader too, claims one item after the other, so that a thread
//! that the system does not run only leaves more items to the others; the leader waits for items that were claimed and are not
//! yet done, and for nothing else. Which thread computes an item must therefore not matter. A thread that waits looks again for
//! some time, and then sleeps until it is woken. A follower that the system keeps interrupting in the middle of items, so that the
//! leader has to wait, stays away for a while: on a busy machine that is faster than to be waited for again and again.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::Kernels;
use super::waiting::{ProcessorTime, Sleeper, lock};

/// About as many claims as each thread has where all items are of one size: small ones are claimed several at a time.
const CLAIMS_PER_THREAD: usize = 32;

/// A follower was interrupted in the middle of an item if it was kept from the processor for at least this long: longer than the
/// system's own work takes, and shorter than the time slices of other threads.
const INTERRUPTION: Duration = Duration::from_millis(1);

/// The machine is busy if that happens again within this time. Then the follower stays away for [`TIMES_AWAY`] times as long as it
/// was interrupted, but not for longer than [`LONGEST_AWAY`].
const RECENTLY: Duration = Duration::from_millis(30);
const TIMES_AWAY: u32 = 10;
const LONGEST_AWAY: Duration = Duration::from_millis(50);

/// Threads that wait for steps.
#[derive(Debug)]
pub struct Pool {
    /// What the threads share; `None` where the caller's thread is the only one.
    shared: Option<Arc<Shared>>,
    /// The threads that follow; `None` where there are none.
    _followers: Option<rayon::ThreadPool>,
    threads: usize,
    /// Held by the thread that leads.
    lead: Mutex<()>,
}

thread_local! {
    /// Whether this thread leads a region, or follows in a pool.
    static BUSY: Cell<bool> = const { Cell::new(false) };
}

impl Pool {
    /// A pool of `threads` threads (at least one), of which one is the caller's. More than there are processors compute nothing
    /// faster.
    ///
    /// # Errors
    /// If the system gives no threads.
    pub fn new(threads: usize) -> Result<Self, rayon::ThreadPoolBuildError> {
        let followers = threads.max(1) - 1;
        let shared = (followers > 0).then(|| Arc::new(Shared::new(followers)));
        let follow = |shared: &Arc<Shared>| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(followers)
                .thread_name(|place| format!("flapjack-{}", place + 1))
                .build()?;
            let shared = Arc::clone(shared);
            pool.spawn_broadcast(move |context| shared.follow(context.index()));
            Ok(pool)
        };
        Ok(Self {
            _followers: shared.as_ref().map(follow).transpose()?,
            shared,
            threads: followers + 1,
            lead: Mutex::new(()),
        })
    }

    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `lead` on this thread, with a team of all threads of the pool that computes with these kernels. Regions of several
    /// threads take turns. One that is opened inside of another has no team but the thread that it is on. A panic in `lead` or
    /// in a step is passed on to the caller.
    pub fn region<R>(&self, kernels: Kernels, lead: impl FnOnce(&Team) -> R) -> R {
        /// Marks the thread as one that leads, until it is dropped.
        struct Leading<'a> {
            _turn: MutexGuard<'a, ()>,
        }
        impl Drop for Leading<'_> {
            fn drop(&mut self) {
                BUSY.set(false);
            }
        }
        let Some(shared) = self.shared.as_ref().filter(|_| !BUSY.get()) else {
            return lead(&Team::solo(kernels));
        };
        let _leading = Leading {
            _turn: lock(&self.lead),
        };
        BUSY.set(true);
        lead(&Team {
            kernels,
            threads: self.threads(),
            shared: Some(Arc::clone(shared)),
            open: AtomicBool::new(false),
        })
    }
}

impl Drop for Pool {
    /// Lets the followers end; steps are over when a pool is dropped.
    fn drop(&mut self) {
        if let Some(shared) = &self.shared {
            shared.quit();
        }
    }
}

/// The threads inside a region, as the leader sees them, and the kernels that they compute with.
pub struct Team {
    kernels: Kernels,
    threads: usize,
    /// `None` for the calling thread alone.
    shared: Option<Arc<Shared>>,
    /// Whether a step is open.
    open: AtomicBool,
}

impl Team {
    /// A team of the calling thread alone.
    pub fn solo(kernels: Kernels) -> Self {
        Self {
            kernels,
            threads: 1,
            shared: None,
            open: AtomicBool::new(false),
        }
    }

    pub fn threads(&self) -> usize {
        self.threads
    }

    pub fn kernels(&self) -> Kernels {
        self.kernels
    }

    /// Runs `step(item)` once for every item below `items`, each on whichever thread is free first, and waits for all. They are
    /// begun in order. Inside of a step, all items run on the thread that asks.
    ///
    /// # Panics
    /// If the step panics on any thread, with its panic; items that were not begun are then left out.
    pub fn items(&self, items: usize, step: impl Fn(usize) + Sync) {
        let alone = items <= 1 || self.shared.is_none() || self.open.swap(true, Ordering::Acquire);
        let Some(shared) = self.shared.as_ref().filter(|_| !alone) else {
            return (0..items).for_each(step);
        };
        let len = (items / (self.threads * CLAIMS_PER_THREAD)).max(1);
        let some = |claim: usize| (claim * len..((claim + 1) * len).min(items)).for_each(&step);
        let result = shared.run(items.div_ceil(len), &some);
        self.open.store(false, Ordering::Release);
        if let Err(panic) = result {
            resume_unwind(panic);
        }
    }

    /// Runs `step(share)` once for every share of some work that is cut into one for each thread.
    ///
    /// # Panics
    /// As [`Team::items`].
    pub fn shares(&self, step: impl Fn(usize) + Sync) {
        self.items(self.threads, step);
    }

    /// The values of `f(item)` for every item below `items`, in order, each computed on whichever thread is free first.
    pub fn map<T: Send>(&self, items: usize, f: impl Fn(usize) -> T + Sync) -> Vec<T> {
        let mut values: Vec<Option<T>> = (0..items).map(|_| None).collect();
        self.chunks_mut(&mut values, 1, |item, value| value[0] = Some(f(item)));
        let whole = |value: Option<T>| value.expect("every item was visited");
        values.into_iter().map(whole).collect()
    }

    /// Runs `step(i, chunk)` for every chunk of `len` values of `data` (the last may be shorter).
    ///
    /// # Panics
    /// If `len` is 0 and there is data.
    pub fn chunks_mut<T: Send>(
        &self,
        data: &mut [T],
        len: usize,
        step: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let total = data.len();
        if total == 0 {
            return;
        }
        assert!(len > 0, "chunks need a length");
        let data = SharedSlice::new(data);
        self.items(total.div_ceil(len), |i| {
            let range = i * len..((i + 1) * len).min(total);
            // SAFETY: `items` hands out every index once, and ranges of different indices do not overlap.
            step(i, unsafe { data.range(range) });
        });
    }
}

type Step<'a> = &'a (dyn Fn(usize) + Sync + 'a);
type Panic = Box<dyn Any + Send>;

/// What the threads of a pool share. What changes with every step comes first, on cache lines of its own.
#[derive(Debug)]
#[repr(align(128))]
struct Shared {
    /// The items of the step in its high half, and how many of them were claimed in its low half: more than there are once all
    /// are.
    claims: AtomicU64,
    /// Items of the step that are done. The leader counts its own all at once.
    done: AtomicUsize,
    step: StepCell,
    /// Whether a step has panicked on a follower.
    panicked: AtomicBool,
    quit: AtomicBool,
    leader: Sleeper,
    followers: Vec<Sleeper>,
    /// The first panic of a step on a follower.
    panic: Mutex<Option<Panic>>,
}

/// The step that is open.
#[derive(Default)]
struct StepCell(UnsafeCell<Option<Step<'static>>>);

// SAFETY: only the leader writes it, while no item of a step is claimed and not yet done. Followers read it only between
// claiming an item and counting it as done. A claim (acquire) comes after the opening of the step (release) that it is of, and
// the leader sees the count of items done (acquire, release) before it returns from a step, and so before it can write again.
unsafe impl Sync for StepCell {}
// SAFETY: the step is a shared reference to something that is Sync.
unsafe impl Send for StepCell {}

impl std::fmt::Debug for StepCell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("StepCell")
    }
}

/// Which item was claimed, of how many.
struct Claim {
    item: usize,
    items: usize,
}

impl Shared {
    fn new(followers: usize) -> Self {
        Self {
            claims: AtomicU64::new(0),
            done: AtomicUsize::new(0),
            step: StepCell::default(),
            panicked: AtomicBool::new(false),
            quit: AtomicBool::new(false),
            leader: Sleeper::default(),
            followers: (0..followers).map(|_| Sleeper::default()).collect(),
            panic: Mutex::new(None),
        }
    }

    /// Opens a step, takes part in it, and waits for what others have claimed. Called by one thread at a time, and not inside of
    /// a step.
    fn run(&self, items: usize, step: Step<'_>) -> Result<(), Panic> {
        // SAFETY: the lifetime is extended only until this function returns, and it returns only when every item is done, and so
        // claimed; see `StepCell` for why nobody reads the cell while it is written.
        unsafe {
            *self.step.0.get() = Some(std::mem::transmute::<Step<'_>, Step<'static>>(step));
        }
        self.done.store(0, Ordering::Relaxed);
        // The first item is the leader's. In one order with `Sleeper::wait`: either that sees the items, or `wake` sees that it
        // sleeps.
        let claims = u64::from(u32::try_from(items).expect("items of one step")) << 32 | 1;
        self.claims.store(claims, Ordering::SeqCst);
        self.wake(items - 1);
        let mut own = 1;
        let result = catch_unwind(AssertUnwindSafe(|| {
            step(0);
            while let Some(claim) = self.claim() {
                own += 1;
                step(claim.item);
            }
        }));
        if result.is_err() {
            // What nobody has claimed is left out.
            let (claimed, items) = parts(self.claims.swap(0, Ordering::AcqRel));
            own += items - claimed.min(items);
        }
        if self.done.fetch_add(own, Ordering::SeqCst) + own < items {
            let done = || self.done.load(Ordering::SeqCst) == items;
            self.leader.wait(done);
        }
        result?;
        match self.panicked.swap(false, Ordering::Relaxed) {
            true => Err(lock(&self.panic).take().expect("it was put there")),
            false => Ok(()),
        }
    }

    /// What every thread but the leader does until the pool is dropped.
    fn follow(&self, place: usize) {
        BUSY.set(true);
        let (sleeper, quits) = (&self.followers[place], || self.quit.load(Ordering::SeqCst));
        let mut interruptions = Interruptions::new();
        while !quits() {
            if sleeper.wait(|| self.has_items() || quits()) {
                interruptions.slept();
            }
            let start = Instant::now();
            let mut own = 0;
            let mut items = 0;
            while let Some(claim) = self.claim() {
                // SAFETY: this thread has claimed an item that it has not yet counted as done; see `StepCell`.
                let step = unsafe { (*self.step.0.get()).expect("an item is of a step") };
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| step(claim.item))) {
                    lock(&self.panic).get_or_insert(panic);
                    self.panicked.store(true, Ordering::Relaxed);
                }
                own += 1;
                items = claim.items;
            }
            // The step does not end before all of them are counted, so that they are of one step.
            if own > 0
                && self.done.fetch_add(own, Ordering::SeqCst) + own == items
                && self.leader.wake()
            {
                // It has waited long.
                if let Some(time) = interruptions.waited_for(start.elapsed()) {
                    sleeper.stay_away(time, quits);
                    interruptions.slept();
                }
            }
        }
    }

    /// An item of the open step that nobody else has; `None` if there is none.
    fn claim(&self) -> Option<Claim> {
        if !self.has_items() {
            return None;
        }
        // The step may have ended since, and another one begun; then this is an item of that one.
        let (item, items) = parts(self.claims.fetch_add(1, Ordering::AcqRel));
        (item < items).then_some(Claim { item, items })
    }

    fn has_items(&self) -> bool {
        let (claimed, items) = parts(self.claims.load(Ordering::SeqCst));
        claimed < items
    }

    /// Wakes as many followers as there is work for, if so many sleep.
    fn wake(&self, items: usize) {
        let woken = self.followers.iter().filter(|follower| follower.wake());
        woken.take(items).for_each(drop);
    }

    fn quit(&self) {
        self.quit.store(true, Ordering::SeqCst);
        for follower in &self.followers {
            follower.call();
        }
    }
}

/// How many items were claimed and how many there are, of [`Shared::claims`].
fn parts(claims: u64) -> (usize, usize) {
    let claimed = claims & u64::from(u32::MAX);
    (claimed as usize, (claims >> 32) as usize)
}

/// How a follower was interrupted when others waited for it.
struct Interruptions {
    /// Since it has slept.
    time: ProcessorTime,
    /// When it last went on after an interruption, or came back.
    last: Option<Instant>,
}

impl Interruptions {
    fn new() -> Self {
        Self {
            time: ProcessorTime::start(),
            last: None,
        }
    }

    fn slept(&mut self) {
        self.time = ProcessorTime::start();
    }

    /// After an item that took so long and was waited for: for how long to stay away; `None` if it was not interrupted, or not
    /// again.
    fn waited_for(&mut self, took: Duration) -> Option<Duration> {
        let lost = self.time.lost().min(took);
        if lost < INTERRUPTION {
            return None;
        }
        let away = (TIMES_AWAY * lost).min(LONGEST_AWAY);
        let again = self.last.is_some_and(|last| last.elapsed() < RECENTLY);
        let back = Instant::now() + if again { away } else { Duration::ZERO };
        self.last = Some(back);
        again.then_some(away)
    }
}

/// A mutable slice that several threads write to in places that do not overlap.
pub(super) struct SharedSlice<'a, T> {
    start: *mut T,
    len: usize,
    _borrow: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: it is a mutable borrow that is handed out in parts, by `range`, whose callers promise that they do not overlap.
unsafe impl<T: Send> Sync for SharedSlice<'_, T> {}

impl<'a, T> SharedSlice<'a, T> {
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        Self {
            start: slice.as_mut_ptr(),
            len: slice.len(),
            _borrow: std::marker::PhantomData,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn as_mut_ptr(&self) -> *mut T {
        self.start
    }

    /// # Safety
    /// Nobody else may hold any value of the range at the same time.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn range(&self, range: std::ops::Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: the range is inside the borrowed slice, and the caller vouches that it is held by nobody else.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often each item was visited by a step of `items` items.
    fn visits(items: usize, run: impl FnOnce(&(dyn Fn(usize) + Sync))) -> Vec<usize> {
        let visits: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
        run(&|item| _ = visits[item].fetch_add(1, Ordering::Relaxed));
        visits.into_iter().map(AtomicUsize::into_inner).collect()
    }

    #[test]
    fn a_step_does_not_wait_for_followers_that_never_begin() {
        // Nobody follows.
        let shared = Shared::new(3);
        for items in [2, 4, 100] {
            let visits = visits(items, |step| shared.run(items, step).unwrap());
            assert_eq!(visits, vec![1; items]);
        }
    }

    #[test]
    fn one_that_comes_late_finds_nothing_of_steps_that_have_ended() {
        let shared = Shared::new(1);
        shared.run(5, &|_| {}).unwrap();
        assert!(shared.claim().is_none());
        let panic = shared.run(5, &|item| assert_ne!(item, 2)).unwrap_err();
        assert!(
            panic
                .downcast_ref::<String>()
                .unwrap()
                .contains("left != right")
        );
        assert!(shared.claim().is_none());
        assert_eq!(visits(3, |step| shared.run(3, step).unwrap()), [1; 3]);
    }

    #[test]
    #[cfg(unix)]
    fn a_follower_stays_away_when_it_is_interrupted_again_and_others_wait() {
        let ms = Duration::from_millis;
        let sleep = || std::thread::sleep(ms(2));
        let mut interruptions = Interruptions::new();
        assert_eq!(interruptions.waited_for(ms(5)), None, "not interrupted");
        sleep();
        assert_eq!(interruptions.waited_for(ms(2)), None, "the first time");
        let (again, longer) = (
            interruptions.waited_for(ms(2)),
            interruptions.waited_for(ms(1000)),
        );
        assert_eq!(again, Some(ms(20)));
        assert!(longer > again && longer <= Some(LONGEST_AWAY));
        interruptions.slept();
        assert_eq!(
            interruptions.waited_for(ms(1000)),
            None,
            "not since it came back"
        );
        interruptions.last = Some(Instant::now() - RECENTLY);
        sleep();
        assert_eq!(interruptions.waited_for(ms(2)), None, "long ago");
    }

    #[test]
    fn the_leader_waits_for_an_item_that_was_claimed() {
        let shared = Shared::new(1);
        let claimed = AtomicBool::new(false);
        let finished = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // Follows by hand.
            scope.spawn(|| {
                let claim = loop {
                    match shared.claim() {
                        Some(claim) => break claim,
                        None => std::hint::spin_loop(),
                    }
                };
                claimed.store(true, Ordering::SeqCst);
                while !shared.leader.wake() {
                    std::thread::yield_now();
                }
                finished.store(true, Ordering::SeqCst);
                assert_eq!(shared.done.fetch_add(1, Ordering::SeqCst) + 1, claim.items);
                shared.leader.wake();
            });
            let step = |item| {
                while item == 0 && !claimed.load(Ordering::SeqCst) {
                    std::hint::spin_loop();
                }
            };
            shared.run(2, &step).unwrap();
            assert!(finished.load(Ordering::SeqCst));
        });
    }
}
