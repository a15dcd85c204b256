//! Threads: every item of a step once, whoever is there to compute it; panics; and no more threads than can run.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Barrier, Mutex};
use std::thread;
use std::time::Duration;

use flapjack::engine::{Engine, Notice, OpenOptions};
use flapjack::kernels::{Isa, Kernels, Pool, Team};

use crate::common::Random;
use crate::common::engine::Workshop;

fn plain() -> Kernels {
    Kernels::for_isa(Isa::Generic).expect("plain C is always there")
}

/// Numbers of threads: one, some, and more than this machine has processors.
fn numbers_of_threads() -> [usize; 5] {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    [1, 2, 3, 5, 4 * processors]
}

/// Asserts that a step of so many items visits each of them once.
fn assert_visits_all(team: &Team, items: usize, meanwhile: impl Fn(usize) + Sync) {
    let visits: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
    team.items(items, |i| {
        meanwhile(i);
        visits[i].fetch_add(1, Ordering::Relaxed);
    });
    assert!(visits.iter().all(|v| v.load(Ordering::Relaxed) == 1));
}

// ---- items ----

#[test]
fn every_item_of_many_short_steps_is_visited_once() {
    for threads in numbers_of_threads() {
        let pool = Pool::new(threads).unwrap();
        for _ in 0..20 {
            pool.region(plain(), |team| {
                assert_eq!(team.threads(), threads);
                for step in 0..100 {
                    assert_visits_all(team, step % 13, |_| {});
                }
                assert_visits_all(team, 1000, |_| {});
            });
        }
    }
}

#[test]
fn threads_that_are_held_up_and_steps_that_let_them_sleep_change_nothing() {
    for threads in [2, 3, 8] {
        let pool = Pool::new(threads).unwrap();
        let random = Mutex::new(Random::new(7));
        // Some items and gaps are longer than waiting threads stay awake, and some longer than a time slice.
        let dawdle = || {
            let tenths = random.lock().unwrap().tokens(1, 60)[0];
            match tenths {
                0..50 => {}
                50..58 => thread::yield_now(),
                _ => thread::sleep(Duration::from_micros(1500)),
            }
        };
        for _ in 0..10 {
            pool.region(plain(), |team| {
                for step in 0..30 {
                    assert_visits_all(team, 1 + step % 17, |_| dawdle());
                    dawdle();
                }
            });
        }
    }
}

#[test]
fn shares_are_one_for_each_thread() {
    for threads in numbers_of_threads() {
        let pool = Pool::new(threads).unwrap();
        let shares = Mutex::new(Vec::new());
        pool.region(plain(), |team| {
            team.shares(|s| shares.lock().unwrap().push(s))
        });
        let mut shares = shares.into_inner().unwrap();
        shares.sort();
        assert!(shares.into_iter().eq(0..threads));
    }
}

#[test]
fn threads_that_sleep_are_woken_and_work_at_the_same_time() {
    let pool = Pool::new(3).unwrap();
    for pause in [0, 1, 20] {
        thread::sleep(Duration::from_millis(pause));
        let (barrier, workers) = (Barrier::new(3), Mutex::new(HashSet::new()));
        pool.region(plain(), |team| {
            // Nobody gets past the barrier alone.
            team.items(3, |_| {
                barrier.wait();
                workers.lock().unwrap().insert(thread::current().id());
            });
        });
        assert_eq!(workers.into_inner().unwrap().len(), 3);
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
    for threads in numbers_of_threads() {
        let pool = Pool::new(threads).unwrap();
        let squares = pool.region(plain(), |team| team.map(100, |i| i * i));
        assert!(squares.into_iter().eq((0..100).map(|i| i * i)));
    }
}

// ---- regions ----

#[test]
fn the_calling_thread_leads() {
    let pool = Pool::new(2).unwrap();
    let leader = pool.region(plain(), |_| thread::current().id());
    assert_eq!(leader, thread::current().id());
}

#[test]
fn a_step_inside_of_a_step_and_a_region_inside_of_a_region_have_one_thread() {
    let (pool, other) = (Pool::new(3).unwrap(), Pool::new(2).unwrap());
    let sum = AtomicUsize::new(0);
    let add = |i| _ = sum.fetch_add(i, Ordering::Relaxed);
    pool.region(plain(), |team| {
        team.items(10, |_| {
            let here = thread::current().id();
            team.items(10, |i| {
                assert_eq!(thread::current().id(), here);
                add(i);
            });
            for pool in [&pool, &other] {
                pool.region(plain(), |team| {
                    assert_eq!(team.threads(), 1);
                    team.items(10, add);
                });
            }
        });
        pool.region(plain(), |team| assert_eq!(team.threads(), 1));
        assert_visits_all(team, 10, |_| {});
    });
    assert_eq!(sum.into_inner(), 10 * 45 * 3);
    pool.region(plain(), |team| assert_eq!(team.threads(), 3));
}

#[test]
fn regions_of_several_threads_take_turns() {
    let pool = Pool::new(2).unwrap();
    let inside = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50 {
                    pool.region(plain(), |team| {
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        assert_visits_all(team, 7, |_| {});
                        inside.fetch_sub(1, Ordering::SeqCst);
                    });
                }
            });
        }
    });
}

#[test]
fn a_pool_can_be_dropped_at_any_time() {
    for pause in [0, 0, 0, 50, 200, 1000, 5000] {
        let pool = Pool::new(4).unwrap();
        thread::sleep(Duration::from_micros(pause));
        drop(pool);
        let pool = Pool::new(4).unwrap();
        pool.region(plain(), |team| assert_visits_all(team, 9, |_| {}));
        thread::sleep(Duration::from_micros(pause));
    }
}

// ---- panics ----

/// What a step's panic says.
fn panic_of(run: impl FnOnce()) -> String {
    let panic = catch_unwind(AssertUnwindSafe(run)).expect_err("it panics");
    (*panic.downcast_ref::<&str>().expect("words")).to_owned()
}

#[test]
fn a_panic_on_any_thread_reaches_the_caller_and_the_pool_lives_on() {
    let pool = Pool::new(2).unwrap();
    for guilty in 0..2 {
        // Both items are begun, and so on two threads; the leader has the first.
        let barrier = Barrier::new(2);
        let words = panic_of(|| {
            pool.region(plain(), |team| {
                team.items(2, |item| {
                    barrier.wait();
                    if item == guilty {
                        panic!("guilty");
                    }
                });
            });
        });
        assert_eq!(words, "guilty");
        pool.region(plain(), |team| assert_visits_all(team, 10, |_| {}));
    }
    let words = panic_of(|| pool.region(plain(), |_| panic!("the leader's own")));
    assert_eq!(words, "the leader's own");
    pool.region(plain(), |team| assert_visits_all(team, 10, |_| {}));
}

#[test]
fn a_panic_ends_its_step_before_the_caller_goes_on() {
    let pool = Pool::new(2).unwrap();
    let (barrier, finished) = (Barrier::new(2), AtomicUsize::new(0));
    let words = panic_of(|| {
        pool.region(plain(), |team| {
            team.items(2, |item| {
                barrier.wait();
                match item {
                    0 => panic!("early"),
                    _ => thread::sleep(Duration::from_millis(20)),
                }
                finished.fetch_add(1, Ordering::SeqCst);
            });
        });
    });
    assert_eq!(words, "early");
    assert_eq!(finished.into_inner(), 1);
}

// ---- no more than can run ----

#[test]
fn more_threads_than_processors_are_not_made() {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let workshop = Workshop::new();
    let open = |threads| {
        let options = OpenOptions {
            threads,
            ..OpenOptions::default()
        };
        let engine = Engine::open(&workshop.model, options).unwrap();
        (engine.report().threads, engine.notices().to_vec())
    };
    assert_eq!(open(None), (processors, vec![]));
    assert_eq!(open(Some(1)), (1, vec![]));
    assert_eq!(open(Some(processors)), (processors, vec![]));
    let notice = Notice::FewerThreads {
        asked: processors + 62,
        used: processors,
    };
    assert_eq!(open(Some(processors + 62)), (processors, vec![notice]));
}

#[test]
fn the_program_warns_of_threads_that_would_make_nothing_faster() {
    let workshop = Workshop::new();
    let output = workshop.flapjack(&["run", "-p", "a", "-n", "2", "-t", "1024"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(
        said.contains("instead of 1024: there are no more processors"),
        "{said}"
    );
    let output = workshop.flapjack(&["run", "-p", "a", "-n", "2", "-t", "1"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!said.contains("instead of"), "{said}");
}

/// Processors that a process may not run on are not counted.
#[test]
#[cfg(target_os = "linux")]
fn a_process_that_may_run_on_one_processor_has_one_thread() {
    let workshop = Workshop::new();
    thread::scope(|scope| {
        let alone = scope.spawn(|| {
            // The mask is this thread's, and that of the threads and processes that it starts.
            let (mut all, size) = unsafe { (std::mem::zeroed(), size_of::<libc::cpu_set_t>()) };
            assert_eq!(unsafe { libc::sched_getaffinity(0, size, &mut all) }, 0);
            let allowed = |cpu: &usize| unsafe { libc::CPU_ISSET(*cpu, &all) };
            let first = (0..libc::CPU_SETSIZE as usize).find(allowed).unwrap();
            let mut one: libc::cpu_set_t = unsafe { std::mem::zeroed() };
            unsafe { libc::CPU_SET(first, &mut one) };
            assert_eq!(unsafe { libc::sched_setaffinity(0, size, &one) }, 0);

            let engine = Engine::open(&workshop.model, OpenOptions::default()).unwrap();
            assert_eq!(engine.report().threads, 1);
            let output = workshop.flapjack(&["run", "-p", "a", "-n", "2", "-t", "2"]);
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(said.contains("1 thread instead of 2"), "{said}");
        });
        alone.join().unwrap();
    });
}
