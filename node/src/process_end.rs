//! Waiting for the end of processes that are no children of ours: one thread polls all pidfds.

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use tokio::sync::oneshot;

/// Ends reported at once.
const BATCH: usize = 64;

struct Waiting {
    next: u64,
    ends: HashMap<u64, (OwnedFd, oneshot::Sender<()>)>,
}

struct Watch {
    epoll: OwnedFd,
    waiting: Mutex<Waiting>,
}

/// Waits until the process behind `pidfd` has ended.
///
/// # Errors
/// Where the kernel does not let us watch it.
pub(crate) async fn process_end(pidfd: OwnedFd) -> io::Result<()> {
    let ended = watch()?.add(pidfd)?;
    // The sender goes only with a message: the thread never ends.
    let _ = ended.await;
    Ok(())
}

fn watch() -> io::Result<Arc<Watch>> {
    static WATCH: OnceLock<Arc<Watch>> = OnceLock::new();
    static STARTING: Mutex<()> = Mutex::new(());
    let _one = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(watch) = WATCH.get() {
        return Ok(Arc::clone(watch));
    }
    let watch = Arc::new(Watch {
        epoll: epoll::create(CreateFlags::CLOEXEC)?,
        waiting: Mutex::new(Waiting { next: 0, ends: HashMap::new() }),
    });
    let of_thread = Arc::clone(&watch);
    std::thread::Builder::new().name("trine-pidfds".into()).spawn(move || of_thread.run())?;
    Ok(Arc::clone(WATCH.get_or_init(|| watch)))
}

impl Watch {
    fn add(&self, pidfd: OwnedFd) -> io::Result<oneshot::Receiver<()>> {
        let (sender, ended) = oneshot::channel();
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let id = waiting.next;
        waiting.next += 1;
        epoll::add(&self.epoll, &pidfd, EventData::new_u64(id), EventFlags::IN)?;
        waiting.ends.insert(id, (pidfd, sender));
        Ok(ended)
    }

    fn run(&self) {
        let mut events = [Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }; BATCH];
        loop {
            let count = match epoll::wait(&self.epoll, &mut events, None) {
                Ok(count) => count,
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => {
                    tracing::error!(%error, "ends of processes are no longer seen");
                    return;
                }
            };
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            for event in &events[..count] {
                if let Some((pidfd, sender)) = waiting.ends.remove(&event.data.u64()) {
                    let _ = epoll::delete(&self.epoll, &pidfd);
                    let _ = sender.send(());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::ProcessRecord;
    use std::process::Command;

    #[tokio::test]
    async fn an_end_is_seen_and_only_that_processes() {
        let mut short = Command::new("sleep").arg("600").spawn().unwrap();
        let mut long = Command::new("sleep").arg("600").spawn().unwrap();
        let pidfd = |pid| ProcessRecord::of(pid).unwrap().hold().unwrap().into_pidfd();
        let short_ends = process_end(pidfd(short.id()));
        let long_ends = process_end(pidfd(long.id()));
        short.kill().unwrap();
        tokio::pin!(long_ends);
        tokio::select! {
            ended = short_ends => ended.unwrap(),
            _ = &mut long_ends => panic!("the other process lives"),
        }
        long.kill().unwrap();
        long_ends.await.unwrap();
        short.wait().unwrap();
        long.wait().unwrap();
    }
}
