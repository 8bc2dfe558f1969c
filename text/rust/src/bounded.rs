//! Runs untrusted work (templates) on a thread of its own with a large stack, a budget of memory and a deadline.
//!
//! Fuel bounds the instructions of a template but not what one instruction costs: `s ~ s` doubles a string, and a list
//! nested a million deep recurses as deep when it is dropped. An allocation over the budget cannot be refused (Rust
//! aborts) and must not unwind, so the thread is stopped where it stands and its caller told. A stopped thread keeps its
//! memory for good; `Abandoned` counts them so that a template can leave only a few behind.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::ptr;
use std::sync::atomic::{AtomicIsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

/// Reserved, not used, unless a template nests values deeply: 2 million instructions nest at most some 300,000 values,
/// and dropping or printing one of them takes below 1 KiB of stack.
const STACK_BYTES: usize = 1 << 30;
/// Copies of large strings cost time, so what a run allocates in all is bounded too: this many times its memory.
const CHURN: u64 = 32;
const ABANDONED_MAX: isize = 4;

#[derive(Clone, Copy)]
pub struct Limits {
    pub memory_bytes: u64,
    pub time: Duration,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Stopped {
    Memory,
    Time,
    Panic,
    /// Too many earlier runs were stopped and still hold their memory.
    Abandoned,
    /// The system gave no thread.
    NoThread,
}

/// Runs that were stopped or ran late and are not over.
#[derive(Clone, Default)]
pub struct Abandoned(Arc<AtomicIsize>);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Running,
    Done,
    OutOfMemory,
    /// The caller no longer waits.
    Late,
}

struct Signal {
    phase: Mutex<Phase>,
    changed: Condvar,
}

impl Signal {
    fn lock(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Tells the caller; returns the phase before.
    fn set(&self, phase: Phase) -> Phase {
        let mut guard = self.lock();
        let before = *guard;
        if before == Phase::Running {
            *guard = phase;
        }
        self.changed.notify_all();
        before
    }

    fn wait(&self, time: Duration) -> Phase {
        let deadline = Instant::now() + time;
        let mut guard = self.lock();
        while *guard == Phase::Running {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                *guard = Phase::Late;
                break;
            }
            guard = self.changed.wait_timeout(guard, left).unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        }
        *guard
    }
}

struct Budget {
    live: Cell<i64>,
    total: Cell<u64>,
    live_max: i64,
    total_max: u64,
    signal: *const Signal,
}

thread_local! {
    static BUDGET: Cell<*const Budget> = const { Cell::new(ptr::null()) };
}

/// The system's allocator, which charges the thread's budget where there is one.
pub struct BudgetAllocator;

fn charge(size: usize) {
    let budget = BUDGET.get();
    if budget.is_null() {
        return;
    }
    // SAFETY: `run` keeps the budget and its signal alive while BUDGET points to it.
    let budget = unsafe { &*budget };
    budget.live.set(budget.live.get().saturating_add(size as i64));
    budget.total.set(budget.total.get().saturating_add(size as u64));
    if budget.live.get() > budget.live_max || budget.total.get() > budget.total_max {
        BUDGET.set(ptr::null());
        // SAFETY: as above. Neither the lock nor the condition variable allocates.
        unsafe { (*budget.signal).set(Phase::OutOfMemory) };
        loop {
            thread::sleep(Duration::from_secs(3600));
        }
    }
}

fn refund(size: usize) {
    let budget = BUDGET.get();
    if !budget.is_null() {
        // SAFETY: as in `charge`.
        let budget = unsafe { &*budget };
        budget.live.set(budget.live.get() - size as i64);
    }
}

// SAFETY: every call is passed on to System unchanged.
unsafe impl GlobalAlloc for BudgetAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        charge(layout.size());
        System.alloc(layout)
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        charge(layout.size());
        System.alloc_zeroed(layout)
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        refund(layout.size());
        System.dealloc(pointer, layout)
    }
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        charge(size);
        refund(layout.size());
        System.realloc(pointer, layout, size)
    }
}

/// Runs `work` and returns what it returns, or why it was stopped.
pub fn run<T, F>(limits: Limits, abandoned: &Abandoned, work: F) -> Result<T, Stopped>
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    if abandoned.0.load(Ordering::Relaxed) >= ABANDONED_MAX {
        return Err(Stopped::Abandoned);
    }
    let signal = Arc::new(Signal { phase: Mutex::new(Phase::Running), changed: Condvar::new() });
    let slot = Arc::new(Mutex::new(None));
    let body = {
        let (signal, slot, abandoned) = (signal.clone(), slot.clone(), abandoned.clone());
        move || {
            let budget = Budget {
                live: Cell::new(0),
                total: Cell::new(0),
                live_max: i64::try_from(limits.memory_bytes).unwrap_or(i64::MAX),
                total_max: limits.memory_bytes.saturating_mul(CHURN),
                signal: Arc::as_ptr(&signal),
            };
            BUDGET.set(&budget);
            let result = catch_unwind(AssertUnwindSafe(work));
            BUDGET.set(ptr::null());
            *slot.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(result.map_err(|_| ()));
            if signal.set(Phase::Done) == Phase::Late {
                abandoned.0.fetch_sub(1, Ordering::Relaxed);
            }
        }
    };
    let builder = thread::Builder::new().name("template".into()).stack_size(STACK_BYTES);
    let handle = builder.spawn(body).map_err(|_| Stopped::NoThread)?;
    let phase = signal.wait(limits.time);
    // A late thread that ends at once may subtract before this adds.
    if phase != Phase::Done {
        abandoned.0.fetch_add(1, Ordering::Relaxed);
    }
    match phase {
        Phase::Done => {
            // The thread's stack is given back before the next one is asked for.
            let _ = handle.join();
            let result = slot.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
            match result {
                Some(Ok(value)) => Ok(value),
                _ => Err(Stopped::Panic),
            }
        }
        Phase::OutOfMemory => Err(Stopped::Memory),
        Phase::Late | Phase::Running => Err(Stopped::Time),
    }
}
