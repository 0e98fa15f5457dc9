//! The runtime of a build with the simulator: tokio's, and inside a simulated world the world's.

use std::{
    fmt, io,
    ops::{Add, AddAssign, Sub, SubAssign},
    pin::{Pin, pin},
    sync::OnceLock,
    task::{Context, Poll},
    time::Duration,
};

use openraft::AsyncRuntime;
use openraft_rt_sim::{SimInstant, SimJoinError, SimJoinHandle, SimRuntime, SimSleep, SimWatch};
use openraft_rt_tokio::TokioRuntime;
use rand::{SeedableRng, rngs::SmallRng};

use super::{
    is_running,
    node::{Scoped, owner, spawn_free},
};

/// Either runtime, chosen by where the code runs.
#[derive(Debug)]
pub(crate) struct Runtime(TokioRuntime);

/// A point on either clock, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Instant(u64);

fn host_start() -> tokio::time::Instant {
    static START: OnceLock<tokio::time::Instant> = OnceLock::new();
    // A day, so that subtracting from an early instant stays above zero.
    *START.get_or_init(|| {
        let now = tokio::time::Instant::now();
        now.checked_sub(DAY).unwrap_or(now)
    })
}

const DAY: Duration = Duration::from_secs(86_400);

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl openraft::Instant for Instant {
    fn now() -> Self {
        match SimInstant::try_now() {
            Some(simulated) => Self(nanos(simulated.elapsed_since_start() + DAY)),
            None => Self(nanos(host_start().elapsed())),
        }
    }
}

impl Add<Duration> for Instant {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(nanos(duration)))
    }
}

impl AddAssign<Duration> for Instant {
    fn add_assign(&mut self, duration: Duration) {
        *self = *self + duration;
    }
}

impl Sub<Duration> for Instant {
    type Output = Self;

    fn sub(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(nanos(duration)))
    }
}

impl SubAssign<Duration> for Instant {
    fn sub_assign(&mut self, duration: Duration) {
        *self = *self - duration;
    }
}

impl Sub for Instant {
    type Output = Duration;

    fn sub(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// A timer on either clock.
pub(crate) enum Sleep {
    Host(Pin<Box<tokio::time::Sleep>>),
    Simulated(SimSleep),
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        match &mut *self {
            Self::Host(sleep) => sleep.as_mut().poll(context),
            Self::Simulated(sleep) => pin!(sleep).poll(context),
        }
    }
}

/// A deadline passed.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("the deadline has passed")]
pub(crate) struct Elapsed;

/// A future with a deadline.
pub(crate) struct Timeout<T> {
    future: Pin<Box<T>>,
    sleep: Sleep,
}

impl<T: Future> Future for Timeout<T> {
    type Output = Result<T::Output, Elapsed>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Poll::Ready(output) = self.future.as_mut().poll(context) {
            return Poll::Ready(Ok(output));
        }
        Pin::new(&mut self.sleep).poll(context).map(|()| Err(Elapsed))
    }
}

/// A task of either runtime.
pub(crate) enum JoinHandle<T> {
    Host(tokio::task::JoinHandle<T>),
    Simulated(SimJoinHandle<T>),
}

/// Why a task has no result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JoinError {
    #[error(transparent)]
    Host(#[from] tokio::task::JoinError),
    #[error(transparent)]
    Simulated(#[from] SimJoinError),
}

impl<T> Future for JoinHandle<T> {
    type Output = Result<T, JoinError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut *self {
            Self::Host(handle) => pin!(handle).poll(context).map_err(JoinError::from),
            Self::Simulated(handle) => pin!(handle).poll(context).map_err(JoinError::from),
        }
    }
}

/// Spawns into the world, as a part of the node that the running code belongs to.
pub(super) fn spawn_here<F>(future: F) -> SimJoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    match owner() {
        Some(life) => spawn_free(Scoped::new(life, future)),
        None => spawn_free(future),
    }
}

impl AsyncRuntime for Runtime {
    type JoinError = JoinError;
    type JoinHandle<T: Send + 'static> = JoinHandle<T>;
    type Sleep = Sleep;
    type Instant = Instant;
    type TimeoutError = Elapsed;
    type Timeout<R, T: Future<Output = R> + Send> = Timeout<T>;
    type ThreadLocalRng = SmallRng;
    type Mpsc = <TokioRuntime as AsyncRuntime>::Mpsc;
    type Watch = SimWatch;
    type Oneshot = <TokioRuntime as AsyncRuntime>::Oneshot;
    type Mutex<T: Send + 'static> = <TokioRuntime as AsyncRuntime>::Mutex<T>;

    fn spawn<T>(future: T) -> JoinHandle<T::Output>
    where
        T: Future + Send + 'static,
        T::Output: Send + 'static,
    {
        if is_running() {
            return JoinHandle::Simulated(spawn_here(future));
        }
        JoinHandle::Host(tokio::spawn(future))
    }

    fn sleep(duration: Duration) -> Sleep {
        if is_running() {
            return Sleep::Simulated(SimRuntime::sleep(duration));
        }
        Sleep::Host(Box::pin(tokio::time::sleep(duration)))
    }

    fn sleep_until(deadline: Instant) -> Sleep {
        if is_running() {
            return Self::sleep(deadline - <Instant as openraft::Instant>::now());
        }
        let deadline = host_start() + Duration::from_nanos(deadline.0);
        Sleep::Host(Box::pin(tokio::time::sleep_until(deadline)))
    }

    fn timeout<R, F: Future<Output = R> + Send>(duration: Duration, future: F) -> Timeout<F> {
        Timeout { future: Box::pin(future), sleep: Self::sleep(duration) }
    }

    fn timeout_at<R, F: Future<Output = R> + Send>(deadline: Instant, future: F) -> Timeout<F> {
        Timeout { future: Box::pin(future), sleep: Self::sleep_until(deadline) }
    }

    fn is_panic(error: &JoinError) -> bool {
        match error {
            JoinError::Host(error) => error.is_panic(),
            JoinError::Simulated(error) => matches!(error, SimJoinError::Panic(_)),
        }
    }

    fn thread_rng() -> SmallRng {
        if is_running() {
            return SimRuntime::thread_rng();
        }
        SmallRng::from_rng(&mut rand::rng())
    }

    fn new(threads: usize) -> Self {
        Self(TokioRuntime::new(threads))
    }

    fn block_on<F: Future<Output = T>, T>(&mut self, future: F) -> T {
        self.0.block_on(future)
    }

    async fn spawn_blocking<F, T>(work: F) -> Result<T, io::Error>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        if is_running() {
            return Ok(work());
        }
        tokio::task::spawn_blocking(work).await.map_err(io::Error::other)
    }
}

impl fmt::Debug for Sleep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sleep").finish_non_exhaustive()
    }
}
