//! From the resources a configuration names to open files: by path before the sandbox closes
//! (standalone), by descriptor from a request otherwise.

use crate::config::{Resource, VmConfig};
use crate::devices::console::{RingFile, Sink};
use crate::devices::vsock::connector::Outside;
use crate::devices::{Device, balloon, blk, net, rng, vsock};
use abi::lease::LeaseView;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

/// Why a resource could not be had.
#[derive(Debug, thiserror::Error)]
pub enum ResourceError {
    /// A path could not be opened.
    #[error("{what}: open {path}: {source}")]
    Open {
        /// The key of the configuration.
        what: String,
        /// The path.
        path: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A path where only descriptors are taken, or the other way round.
    #[error("{0}: only {1} are taken here")]
    Form(String, &'static str),
    /// A descriptor that did not come with the request, or was named twice.
    #[error("{what}: descriptor {index} did not come with the request, or is used twice")]
    Descriptor {
        /// The key of the configuration.
        what: String,
        /// Its index.
        index: usize,
    },
    /// An open resource is not usable.
    #[error("{what}: {reason}")]
    Unusable {
        /// The key of the configuration.
        what: String,
        /// Why.
        reason: String,
    },
}

/// How a file is opened by path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To read.
    Read,
    /// To read and write; it must exist.
    Write,
    /// To read and write; made where it does not exist.
    Create,
}

/// Where resources come from.
#[derive(Debug)]
pub enum Supply {
    /// The file system.
    Paths,
    /// A request's descriptors.
    Descriptors(Vec<Option<OwnedFd>>),
}

impl Supply {
    /// Descriptors that came with a request.
    pub fn descriptors(descriptors: Vec<OwnedFd>) -> Supply {
        Supply::Descriptors(descriptors.into_iter().map(Some).collect())
    }

    /// Takes a descriptor by its index.
    pub fn descriptor(&mut self, index: usize, what: &str) -> Result<OwnedFd, ResourceError> {
        match self {
            Supply::Paths => Err(ResourceError::Form(what.into(), "paths")),
            Supply::Descriptors(all) => all
                .get_mut(index)
                .and_then(Option::take)
                .ok_or_else(|| ResourceError::Descriptor { what: what.into(), index }),
        }
    }

    /// A file.
    pub fn file(
        &mut self,
        resource: &Resource,
        access: Access,
        what: &str,
    ) -> Result<File, ResourceError> {
        match resource {
            Resource::Descriptor(index) => Ok(File::from(self.descriptor(*index, what)?)),
            Resource::Path(path) => {
                self.only_paths(what)?;
                OpenOptions::new()
                    .read(true)
                    .write(access != Access::Read)
                    .create(access == Access::Create)
                    .mode(0o600)
                    .open(path)
                    .map_err(|source| open_error(what, path, source))
            }
        }
    }

    /// A listening socket.
    pub fn listener(
        &mut self,
        resource: &Resource,
        what: &str,
    ) -> Result<UnixListener, ResourceError> {
        match resource {
            Resource::Descriptor(index) => Ok(UnixListener::from(self.descriptor(*index, what)?)),
            Resource::Path(path) => {
                self.only_paths(what)?;
                UnixListener::bind(path).map_err(|source| open_error(what, path, source))
            }
        }
    }

    /// A connected socket.
    pub fn stream(&mut self, resource: &Resource, what: &str) -> Result<UnixStream, ResourceError> {
        match resource {
            Resource::Descriptor(index) => Ok(UnixStream::from(self.descriptor(*index, what)?)),
            Resource::Path(path) => {
                self.only_paths(what)?;
                UnixStream::connect(path).map_err(|source| open_error(what, path, source))
            }
        }
    }

    /// Fails where a path was named in a request with descriptors.
    pub fn only_paths(&self, what: &str) -> Result<(), ResourceError> {
        match self {
            Supply::Paths => Ok(()),
            Supply::Descriptors(_) => Err(ResourceError::Form(what.into(), "descriptors")),
        }
    }
}

fn open_error(what: &str, path: &Path, source: io::Error) -> ResourceError {
    ResourceError::Open { what: what.into(), path: path.display().to_string(), source }
}

fn open_lease(lease: &Resource, supply: &mut Supply) -> Result<Arc<LeaseView>, ResourceError> {
    let page = supply.file(lease, Access::Read, "lease")?;
    let unusable = |error: abi::lease::LeaseError| ResourceError::Unusable {
        what: "lease".into(),
        reason: error.to_string(),
    };
    LeaseView::map(page.into()).map(Arc::new).map_err(unusable)
}

/// What a guest needs of its host, open.
pub struct Resources {
    /// The kernel image.
    pub kernel: File,
    /// Linux's first file system.
    pub initrd: Option<File>,
    /// Where console output goes.
    pub console: Sink,
    /// Disks, then network devices, then the others: slot order.
    pub devices: Vec<Device>,
    /// The control socket.
    pub control: Option<UnixListener>,
    /// Where the exit record is written.
    pub exit_record: Option<File>,
    /// The host's lease on changing disks.
    pub lease: Option<Arc<LeaseView>>,
    /// What connects for the guest's vsock, outside of the sandbox.
    pub outside: Option<Outside>,
}

impl Resources {
    /// Opens everything that `config` names; `console` is used where it names none.
    pub fn open(
        config: &VmConfig,
        supply: &mut Supply,
        console: Sink,
    ) -> Result<Resources, ResourceError> {
        let kernel = supply.file(&config.boot.kernel, Access::Read, "boot.kernel")?;
        let initrd = config
            .boot
            .initrd
            .as_ref()
            .map(|initrd| supply.file(initrd, Access::Read, "boot.initrd"))
            .transpose()?;
        let console = match &config.console {
            None => console,
            Some(console) => {
                let file = supply.file(&console.file, Access::Create, "console.file")?;
                let ring = RingFile::open(file, console.capacity_bytes).map_err(|error| {
                    ResourceError::Unusable {
                        what: "console.file".into(),
                        reason: error.to_string(),
                    }
                })?;
                Sink::Ring(ring)
            }
        };
        let exit_record = config
            .exit_record
            .as_ref()
            .map(|resource| {
                let file = supply.file(resource, Access::Create, "exit_record")?;
                // What an earlier guest left must not show behind a shorter record.
                file.set_len(0).map_err(|error| ResourceError::Unusable {
                    what: "exit_record".into(),
                    reason: error.to_string(),
                })?;
                Ok::<_, ResourceError>(file)
            })
            .transpose()?;
        let control = config
            .control
            .as_ref()
            .map(|resource| supply.listener(resource, "control"))
            .transpose()?;
        let lease = config.lease.as_ref().map(|lease| open_lease(lease, supply)).transpose()?;
        let mut devices = Vec::new();
        for disk in &config.disks {
            devices.push(blk::open(disk, supply, lease.clone())?);
        }
        for network in &config.nets {
            devices.push(net::open(network, supply)?);
        }
        devices.extend(config.rng.as_ref().map(rng::open));
        if let Some(balloon) = &config.balloon {
            devices.push(balloon::open(balloon)?);
        }
        let mut outside = None;
        if let Some(vsock) = &config.vsock {
            let (device, connects) = vsock::open(vsock, supply)?;
            devices.push(device);
            outside = connects;
        }
        Ok(Resources { kernel, initrd, console, devices, control, exit_record, lease, outside })
    }
}
