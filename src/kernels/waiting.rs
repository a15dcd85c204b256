//! Waiting for other threads, and what the system does with a thread meanwhile.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a waiting thread looks before it sleeps: longer than most gaps between steps of a pass, and about as long as it takes to
/// wake a thread. (Beside busy threads 20 to 50 µs were up to 15 % faster than 100; on a quiet machine these were alike within noise,
/// and 1 ms was 2 to 8 % slower.)
const PATIENCE: Duration = Duration::from_micros(50);

/// How often it looks before it looks at the clock.
const LOOKS: usize = 32;

/// Where one thread waits, and sleeps if that takes long.
#[derive(Debug, Default)]
pub(super) struct Sleeper {
    /// Whether it sleeps, or is about to. Whoever sets this to false wakes it.
    asleep: AtomicBool,
    bed: Mutex<()>,
    bell: Condvar,
}

impl Sleeper {
    /// Returns once this is so; whether the thread has slept. Whoever makes it so must call [`Sleeper::wake`] afterwards; the two
    /// must be sequentially consistent.
    pub(super) fn wait(&self, ready: impl Fn() -> bool) -> bool {
        let mut slept = false;
        while !look_for(&ready) {
            self.asleep.store(true, Ordering::SeqCst);
            if ready() {
                self.asleep.store(false, Ordering::SeqCst);
                break;
            }
            slept = true;
            let mut bed = lock(&self.bed);
            while self.asleep.load(Ordering::SeqCst) {
                bed = self.bell.wait(bed).unwrap_or_else(PoisonError::into_inner);
            }
        }
        slept
    }

    /// Wakes the thread; false if it does not sleep.
    pub(super) fn wake(&self) -> bool {
        let sleeps =
            self.asleep.load(Ordering::SeqCst) && self.asleep.swap(false, Ordering::SeqCst);
        if sleeps {
            self.ring();
        }
        sleeps
    }

    /// Sleeps for a time, from which only [`Sleeper::call`] wakes it, if this is so then.
    pub(super) fn stay_away(&self, time: Duration, called: impl Fn() -> bool) {
        let bed = lock(&self.bed);
        drop(self.bell.wait_timeout_while(bed, time, |()| !called()));
    }

    /// Wakes the thread, also if it stays away.
    pub(super) fn call(&self) {
        self.asleep.store(false, Ordering::SeqCst);
        self.ring();
    }

    fn ring(&self) {
        // The thread looks whether it may get up with the bed in its hands: it has not looked yet, or hears the bell.
        drop(lock(&self.bed));
        self.bell.notify_one();
    }
}

/// Looks until this is so, or patience ends; whether it is so.
fn look_for(ready: impl Fn() -> bool) -> bool {
    let mut begin = None;
    loop {
        for _ in 0..LOOKS {
            if ready() {
                return true;
            }
            std::hint::spin_loop();
        }
        let now = Instant::now();
        if now - *begin.get_or_insert(now) > PATIENCE {
            return false;
        }
    }
}

/// Locks a mutex that guards nothing which a panic could leave in pieces.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What this thread gets of a processor, from a moment on.
#[derive(Debug)]
pub(super) struct ProcessorTime {
    start: Instant,
    /// What it had used before; `None` where the system does not tell.
    before: Option<Duration>,
}

impl ProcessorTime {
    pub(super) fn start() -> Self {
        Self {
            start: Instant::now(),
            before: used(),
        }
    }

    /// Time that has passed without the thread; zero where the system does not tell.
    pub(super) fn lost(&self) -> Duration {
        let used = self.before.zip(used()).map(|(before, now)| now - before);
        used.map_or(Duration::ZERO, |used| {
            self.start.elapsed().saturating_sub(used)
        })
    }
}

/// Processor time that this thread has used.
#[cfg(unix)]
fn used() -> Option<Duration> {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is to a place for one time.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    let seconds = u64::try_from(time.tv_sec).ok()?;
    let nanoseconds = u32::try_from(time.tv_nsec).ok()?;
    (result == 0).then(|| Duration::new(seconds, nanoseconds))
}

#[cfg(not(unix))]
fn used() -> Option<Duration> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_sleeps_is_woken_and_one_that_does_not_is_not() {
        let sleeper = Sleeper::default();
        let there = AtomicBool::new(false);
        assert!(!sleeper.wake());
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| sleeper.wait(|| there.load(Ordering::SeqCst)));
            while !sleeper.asleep.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            there.store(true, Ordering::SeqCst);
            assert!(sleeper.wake());
            assert!(waiting.join().unwrap(), "it has slept");
        });
        assert!(!sleeper.wait(|| true));
    }

    #[test]
    fn one_that_stays_away_is_not_woken_but_called() {
        let sleeper = Sleeper::default();
        let called = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let away = scope.spawn(|| {
                let days = Duration::from_secs(1 << 20);
                sleeper.stay_away(days, || called.load(Ordering::SeqCst));
            });
            assert!(!sleeper.wake());
            called.store(true, Ordering::SeqCst);
            sleeper.call();
            away.join().unwrap();
        });
        sleeper.stay_away(Duration::from_millis(1), || false);
    }

    #[test]
    #[cfg(unix)]
    fn time_asleep_is_lost_and_time_at_work_is_not() {
        let time = ProcessorTime::start();
        std::thread::sleep(Duration::from_millis(20));
        assert!(time.lost() >= Duration::from_millis(19));
        let (time, used_before) = (ProcessorTime::start(), used().unwrap());
        while used().unwrap() - used_before < Duration::from_millis(5) {}
        assert!(time.lost() + Duration::from_millis(5) <= time.start.elapsed());
    }
}
