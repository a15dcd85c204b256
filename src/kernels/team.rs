//! Threads for a forward pass.
//!
//! A forward pass is hundreds of short steps. Handing each to a thread pool would cost more than some of the steps, so a
//! [`Pool`] opens *one* parallel region for a whole pass ([`Pool::region`]): the first thread leads and runs the code as
//! it is written, the others wait, spinning for a while and then yielding, for the steps that the leader shares out
//! through [`Team::each`] and its relatives. Rayon provides the threads.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::Kernels;

/// How often a waiting thread looks again before it lets others run. At about 40 ns a look this is longer than any gap
/// between two steps of a pass, and short beside a time slice.
const SPINS: u32 = 4000;

/// Threads that wait for regions.
#[derive(Debug)]
pub struct Pool {
    pool: Option<rayon::ThreadPool>,
    threads: usize,
}

impl Pool {
    /// A pool of `threads` threads (at least one; one means that everything runs on the caller's).
    ///
    /// # Errors
    /// If the system gives no threads.
    pub fn new(threads: usize) -> Result<Self, rayon::ThreadPoolBuildError> {
        let threads = threads.max(1);
        let pool = (threads > 1)
            .then(|| {
                rayon::ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .thread_name(|i| format!("flapjack-{i}"))
                    .build()
            })
            .transpose()?;
        Ok(Self { pool, threads })
    }

    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `lead` with a team of all threads of the pool that computes with these kernels. A panic in `lead` or in a step is
    /// passed on to the caller.
    pub fn region<R: Send>(&self, kernels: Kernels, lead: impl FnOnce(&Team) -> R + Send) -> R {
        let Some(pool) = &self.pool else {
            return lead(&Team::solo(kernels));
        };
        let team = Team {
            kernels,
            threads: self.threads,
            shared: Shared::default(),
        };
        let lead = Mutex::new(Some(lead));
        let results = pool.broadcast(|context| {
            if context.index() > 0 {
                team.follow(context.index());
                return None;
            }
            let lead = lead.lock().ok()?.take()?;
            let result = catch_unwind(AssertUnwindSafe(|| lead(&team)));
            team.shared.done.store(true, Ordering::Release);
            Some(result)
        });
        match results.into_iter().flatten().next() {
            Some(Ok(result)) => result,
            Some(Err(panic)) => resume_unwind(panic),
            None => unreachable!("the thread with index 0 leads"),
        }
    }
}

/// The threads inside a region, as the leader sees them, and the kernels that they compute with.
pub struct Team {
    kernels: Kernels,
    threads: usize,
    shared: Shared,
}

type Step<'a> = &'a (dyn Fn(usize) + Sync + 'a);

#[derive(Default)]
struct Shared {
    /// The step to run; valid from the moment `epoch` is raised until `running` is 0 again.
    step: UnsafeCell<Option<Step<'static>>>,
    epoch: AtomicUsize,
    running: AtomicUsize,
    panicked: AtomicBool,
    done: AtomicBool,
}

// SAFETY: `step` is written by the leader only, and only while no follower reads it: followers read it after they have
// seen a new epoch (acquire) and before they count themselves out of `running` (release), and the leader waits for that
// before it returns from the step and so before it can write again.
unsafe impl Sync for Shared {}
// SAFETY: the step is a shared reference to something that is Sync.
unsafe impl Send for Shared {}

impl Team {
    /// A team of the calling thread alone.
    pub fn solo(kernels: Kernels) -> Self {
        Self {
            kernels,
            threads: 1,
            shared: Shared::default(),
        }
    }

    pub fn threads(&self) -> usize {
        self.threads
    }

    pub fn kernels(&self) -> Kernels {
        self.kernels
    }

    /// Runs `step(worker)` once on every thread and waits for all. To be called by the leader only, not from inside a step.
    ///
    /// # Panics
    /// If the step panics on any thread.
    pub fn each(&self, step: impl Fn(usize) + Sync) {
        if self.threads == 1 {
            return step(0);
        }
        let shared = &self.shared;
        assert_eq!(
            shared.running.load(Ordering::Acquire),
            0,
            "a step must not start another one"
        );
        let borrowed: Step<'_> = &step;
        // SAFETY: the lifetime is extended only until this function returns, and it returns, also by a panic, only after
        // every follower has counted itself out; see `Shared` for why nobody reads the cell while it is written.
        unsafe {
            *shared.step.get() = Some(std::mem::transmute::<Step<'_>, Step<'static>>(borrowed));
        }
        shared.running.store(self.threads - 1, Ordering::Relaxed);
        shared.epoch.fetch_add(1, Ordering::Release);
        let own = catch_unwind(AssertUnwindSafe(|| step(0)));
        wait_until(|| shared.running.load(Ordering::Acquire) == 0);
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        assert!(
            !shared.panicked.load(Ordering::Acquire),
            "a step panicked on another thread"
        );
    }

    /// Runs `step(worker, item)` for every item below `items`, each on whichever thread is free first.
    pub fn items(&self, items: usize, step: impl Fn(usize, usize) + Sync) {
        if self.threads == 1 || items <= 1 {
            return (0..items).for_each(|item| step(0, item));
        }
        let next = AtomicUsize::new(0);
        self.each(|worker| {
            loop {
                let item = next.fetch_add(1, Ordering::Relaxed);
                if item >= items {
                    break;
                }
                step(worker, item);
            }
        });
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
        self.items(total.div_ceil(len), |_, i| {
            let range = i * len..((i + 1) * len).min(total);
            // SAFETY: `items` hands out every index once, and ranges of different indices do not overlap.
            step(i, unsafe { data.range(range) });
        });
    }

    /// What every thread but the leader does during a region.
    fn follow(&self, worker: usize) {
        let shared = &self.shared;
        let mut seen = 0;
        loop {
            wait_until(|| {
                shared.epoch.load(Ordering::Acquire) != seen || shared.done.load(Ordering::Acquire)
            });
            // The leader ends a region only after every step has been run by all.
            if shared.epoch.load(Ordering::Acquire) == seen {
                return;
            }
            seen += 1;
            // SAFETY: a new epoch was seen and this thread has not yet counted itself out; see `Shared`.
            let step = unsafe { (*shared.step.get()).expect("an epoch brings a step") };
            if catch_unwind(AssertUnwindSafe(|| step(worker))).is_err() {
                shared.panicked.store(true, Ordering::Release);
            }
            shared.running.fetch_sub(1, Ordering::Release);
        }
    }
}

fn wait_until(ready: impl Fn() -> bool) {
    let mut spins = 0;
    while !ready() {
        if spins < SPINS {
            spins += 1;
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
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
    use super::super::Isa;
    use super::*;

    fn plain() -> Kernels {
        Kernels::for_isa(Isa::Generic).expect("plain C is always there")
    }

    #[test]
    fn every_item_is_visited_exactly_once() {
        for threads in [1, 2, 3, 5] {
            let pool = Pool::new(threads).unwrap();
            let visits: Vec<AtomicUsize> = (0..1000).map(|_| AtomicUsize::new(0)).collect();
            pool.region(plain(), |team| {
                for _ in 0..20 {
                    team.items(visits.len(), |_, i| {
                        visits[i].fetch_add(1, Ordering::Relaxed);
                    });
                }
            });
            assert!(visits.iter().all(|v| v.load(Ordering::Relaxed) == 20));
        }
    }

    #[test]
    fn chunks_cover_the_data_and_the_last_may_be_short() {
        let pool = Pool::new(3).unwrap();
        let mut data = vec![0usize; 103];
        pool.region(plain(), |team| {
            team.chunks_mut(&mut data, 10, |i, chunk| chunk.fill(i))
        });
        assert!(data.iter().enumerate().all(|(at, v)| *v == at / 10));
    }

    #[test]
    fn mapped_values_come_in_the_order_of_their_items() {
        for threads in [1, 3] {
            let pool = Pool::new(threads).unwrap();
            let squares = pool.region(plain(), |team| team.map(100, |i| i * i));
            assert!(
                squares
                    .iter()
                    .enumerate()
                    .all(|(i, square)| *square == i * i)
            );
        }
    }

    #[test]
    fn a_panic_on_any_thread_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2).unwrap();
        for guilty in 0..2 {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                pool.region(plain(), |team| {
                    team.each(|worker| assert_ne!(worker, guilty))
                });
            }));
            assert!(caught.is_err());
        }
        assert_eq!(pool.region(plain(), |team| team.threads()), 2);
    }
}
