//! Where the clients of one node sit: a thread in the network namespace of its host, so that the node can
//! be reached whatever becomes of the wire.

use std::fs::File;
use std::future::Future;
use std::os::fd::AsFd;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::api::Api;

/// A thread in a host's network, with a client of the host's node.
pub(super) struct Seat {
    pub(super) api: Api,
    handle: Handle,
    leave: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Seat {
    /// Takes a seat in the network namespace of a process.
    pub(super) fn take(process: i32, api: Api) -> Result<Seat> {
        let namespace = File::open(format!("/proc/{process}/ns/net"))?;
        let (leave, left) = oneshot::channel::<()>();
        let (started, has_started) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let network = Some(LinkNameSpaceType::Network);
            let moved = move_into_link_name_space(namespace.as_fd(), network);
            let runtime = moved
                .map_err(std::io::Error::from)
                .and_then(|()| tokio::runtime::Builder::new_current_thread().enable_all().build());
            match runtime {
                Ok(runtime) => {
                    let _ = started.send(Ok(runtime.handle().clone()));
                    let _ = runtime.block_on(left);
                }
                Err(error) => drop(started.send(Err(error))),
            }
        });
        let handle = has_started.recv()?.context("cannot enter a host's network")?;
        Ok(Seat { api, handle, leave: Some(leave), thread: Some(thread) })
    }

    /// Lets something go on in the seat.
    pub(super) fn spawn(
        &self,
        task: impl Future<Output = ()> + Send + 'static,
    ) -> tokio::task::JoinHandle<()> {
        self.handle.spawn(task)
    }

    /// Does something in the seat and waits for it.
    pub(super) fn run<T: Send + 'static>(
        &self,
        task: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let (send, receive) = mpsc::channel();
        self.handle.spawn(async move { drop(send.send(task.await)) });
        receive.recv().context("a task in a seat panicked")?
    }

    /// GET, tried again until it is answered or `patience` is over.
    pub(super) fn get_patiently(
        &self,
        path: String,
        patience: Duration,
    ) -> Result<serde_json::Value> {
        let api = self.api.clone();
        self.run(async move {
            let until = tokio::time::Instant::now() + patience;
            loop {
                match api.get(&path).await {
                    Err(error) if tokio::time::Instant::now() > until => return Err(error),
                    Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
                    found => return found,
                }
            }
        })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        drop(self.leave.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
