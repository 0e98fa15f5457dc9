//! The control socket: a thread for each connection, one request after the other.

use crate::control::{Envelope, Error, Reply, Request, Status, VERSION};
use crate::directory::Directory;
use crate::fetch::Fetcher;
use crate::images::{Images, Import};
use crate::instances::Instances;
use crate::remote::Remotes;
use crate::volumes::Volumes;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

/// Everything that requests act on.
pub(crate) struct Store {
    pub(crate) directory: Arc<Directory>,
    pub(crate) images: Arc<Images>,
    pub(crate) instances: Instances,
    pub(crate) volumes: Arc<Volumes>,
    pub(crate) fetcher: Fetcher,
    pub(crate) remotes: Remotes,
    pub(crate) instance: String,
    pub(crate) listen: SocketAddr,
    pub(crate) fdatasync_p50_us: OnceLock<u64>,
    pub(crate) stopping: AtomicBool,
}

/// Serves one client until it leaves.
pub(crate) fn serve(store: &Store, socket: &UnixStream) {
    loop {
        let (message, descriptors) = match abi::control::receive(socket) {
            Ok(Some(frame)) => frame,
            Ok(None) => return,
            Err(error) => {
                tracing::warn!(%error, "control connection ended");
                return;
            }
        };
        let (reply, descriptor) = match answer(store, &message, descriptors) {
            Ok(answer) => answer,
            Err(error) => (Reply::Error(error), None),
        };
        let descriptors: Vec<_> = descriptor.iter().map(AsFd::as_fd).collect();
        let sent = serde_json::to_vec(&reply)
            .map_err(std::io::Error::from)
            .and_then(|bytes| abi::control::send(socket, &bytes, &descriptors));
        if let Err(error) = sent {
            tracing::warn!(%error, "send a control reply");
            return;
        }
    }
}

type Answer = (Reply, Option<OwnedFd>);

fn answer(store: &Store, message: &[u8], descriptors: Vec<OwnedFd>) -> Result<Answer, Error> {
    let envelope: Envelope = serde_json::from_slice(message)
        .map_err(|error| Error::invalid(format!("storage request: {error}")))?;
    if envelope.version != VERSION {
        return Err(Error::invalid(format!(
            "storage request of version {}; this process speaks {VERSION}",
            envelope.version
        )));
    }
    let request = match envelope.request {
        Request::ImportImage { image_id, disk_format, size_limit_bytes } => {
            let content = descriptors.into_iter().next().ok_or_else(|| {
                Error::invalid(format!("import of image {image_id}: no descriptor came with it"))
            })?;
            let import = Import { image_id, disk_format, size_limit_bytes, content };
            let image = store.images.import(import, &store.stopping)?;
            return Ok((Reply::Imported(Box::new(image)), None));
        }
        request => request,
    };
    store.answer(request)
}

impl Store {
    fn answer(&self, request: Request) -> Result<Answer, Error> {
        match request {
            Request::Status => Ok((Reply::Status(Box::new(self.status()?)), None)),
            Request::ListVolumes => Ok((Reply::Volumes { volumes: self.volumes.list() }, None)),
            Request::HasImage { sha512 } => {
                Ok((Reply::Held { held: self.images.get(&sha512).is_some() }, None))
            }
            Request::ReadImage { sha512 } => {
                let (file, image) = self.images.read(&sha512)?;
                disk(file, image.size_bytes)
            }
            Request::OpenRoot { server_id } => {
                let (file, size_bytes) = self.instances.open_root(&server_id)?;
                disk(file, size_bytes)
            }
            Request::WriteConfigDrive { server_id, files } => {
                let (file, size_bytes) = self.instances.write_config_drive(&server_id, files)?;
                disk(file, size_bytes)
            }
            Request::AttachVolume(attachment) => {
                let (file, size_bytes) = self.volumes.attach(&attachment)?;
                disk(file, size_bytes)
            }
            Request::ExportVolume(attachment) => {
                let size_bytes = self.volumes.export(&attachment, None)?;
                Ok((Reply::Disk { size_bytes, epoch: None }, None))
            }
            Request::ExportVolumeTo { attachment, host } => {
                let size_bytes = self.volumes.export(&attachment, Some(&host))?;
                Ok((Reply::Disk { size_bytes, epoch: None }, None))
            }
            Request::ConnectVolume { attachment, size_bytes, home } => {
                let (socket, epoch) = self.remotes.connect(&attachment, size_bytes, &home)?;
                Ok((Reply::Disk { size_bytes, epoch: Some(epoch) }, Some(socket)))
            }
            change => {
                self.change(change)?;
                Ok((Reply::Done, None))
            }
        }
    }

    /// The requests whose only answer is that they are done.
    fn change(&self, request: Request) -> Result<(), Error> {
        match request {
            Request::FetchImage { sha512, size_bytes, from } => {
                self.fetcher.fetch(&sha512, size_bytes, &from, &self.stopping)
            }
            Request::DeleteImage { sha512 } => self.images.delete(&sha512),
            Request::CreateRoot { server_id, sha512, size_bytes } => {
                self.instances.create_root(&server_id, &sha512, size_bytes)
            }
            Request::DeleteRoot { server_id } => self.instances.delete(&server_id),
            Request::CreateVolume { volume_id, size_bytes } => {
                self.volumes.create(&volume_id, size_bytes)
            }
            Request::DeleteVolume { volume_id, generation } => {
                self.volumes.delete(&volume_id, generation)
            }
            Request::DetachVolume { volume_id, server_id, generation } => {
                self.volumes.detach(&volume_id, &server_id, generation)
            }
            Request::DisconnectVolume { volume_id, server_id } => {
                self.remotes.disconnect(&volume_id, &server_id)
            }
            answered => Err(Error::invalid(format!("{answered:?} changes nothing"))),
        }
    }

    fn status(&self) -> Result<Status, Error> {
        let (total_bytes, free_bytes) = self.directory.space()?;
        Ok(Status {
            pid: std::process::id(),
            instance: self.instance.clone(),
            directory: self.directory.path().display().to_string(),
            listen: self.listen,
            free_bytes,
            total_bytes,
            images: self.images.list(),
            servers: self.instances.list()?,
            volumes: self.volumes.list(),
            volumes_damaged: self.volumes.damaged(),
            connected: self.remotes.list(),
            fdatasync_p50_us: self.fdatasync_p50_us(),
        })
    }

    /// Measured once, by whoever asks first.
    pub(crate) fn fdatasync_p50_us(&self) -> u64 {
        *self.fdatasync_p50_us.get_or_init(|| {
            self.directory.measure_fdatasync().unwrap_or_else(|error| {
                tracing::warn!(%error, "measure fdatasync");
                0
            })
        })
    }
}

fn disk(descriptor: impl Into<OwnedFd>, size_bytes: u64) -> Result<Answer, Error> {
    Ok((Reply::Disk { size_bytes, epoch: None }, Some(descriptor.into())))
}
