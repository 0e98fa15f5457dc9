//! The process that makes guests' processes. One that dies is replaced at the next guest; the
//! guests it made run on.

use rustix::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use vmm::config::VmConfig;
use vmm::spawner::{Client, SpawnError, Spawned};

/// A spawner that is there when it is needed.
pub(crate) struct Spawner {
    executable: PathBuf,
    current: Mutex<Arc<Client>>,
}

impl Spawner {
    /// Starts it from the VMM's executable; blocking.
    pub(crate) fn start(executable: PathBuf) -> Result<Spawner, SpawnError> {
        let current = Mutex::new(Arc::new(Client::start(&executable)?));
        Ok(Spawner { executable, current })
    }

    /// How tightly guests are closed, in words.
    pub(crate) fn sandbox(&self) -> String {
        self.current().sandbox().to_owned()
    }

    /// Starts a guest; see [`Client::spawn`]. Blocking.
    pub(crate) fn spawn(
        &self,
        config: &VmConfig,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Spawned, SpawnError> {
        let spawner = self.current();
        match spawner.spawn(config, descriptors) {
            Err(SpawnError::Gone(error)) => {
                tracing::error!(%error, "the VMM's spawner has gone and is started again");
                self.replace(&spawner)?.spawn(config, descriptors)
            }
            result => result,
        }
    }

    fn current(&self) -> Arc<Client> {
        Arc::clone(&self.current.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Another thread may have replaced `gone` already.
    fn replace(&self, gone: &Arc<Client>) -> Result<Arc<Client>, SpawnError> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if Arc::ptr_eq(&current, gone) {
            *current = Arc::new(Client::start(&self.executable)?);
        }
        Ok(Arc::clone(&current))
    }
}
