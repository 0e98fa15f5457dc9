//! Content of images: in from a client, out to a client.

use super::Node;
use controller::api::{BodyStream, CloudError, UploadedImage};
use controller::ids::HostId;
use controller::state::State;
use controller::state::image::{Image, ImageContent};
use futures::StreamExt;
use std::sync::Arc;
use storage::control::{ImageInfo, ImageKind, Peer};
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;

/// Largest image.
const IMAGE_BYTES_MAX: u64 = 4 << 40;

/// Stores an upload on this host. The leader has a second one hold it too ([`super::redundancy`]).
pub(super) async fn upload(
    node: &Arc<Node>,
    image: &Image,
    body: BodyStream,
) -> Result<UploadedImage, CloudError> {
    let format = image.disk_format.clone().unwrap_or_else(|| "raw".into());
    let info = import(node, image.id.as_str().to_owned(), format, body).await?;
    let content = ImageContent {
        size_bytes: info.size_bytes,
        virtual_size_bytes: info.virtual_size_bytes,
        md5: info.md5,
        sha512: info.sha512,
        kind: kind(info.kind).into(),
    };
    Ok(UploadedImage { content, host: node.host() })
}

fn kind(kind: ImageKind) -> &'static str {
    match kind {
        ImageKind::Elf => "elf",
        ImageKind::Bzimage => "bzimage",
        ImageKind::Disk => "disk",
    }
}

async fn import(
    node: &Node,
    image_id: String,
    disk_format: String,
    body: BodyStream,
) -> Result<ImageInfo, CloudError> {
    let failed = |error: std::io::Error| CloudError::Failed(format!("a pipe to storage: {error}"));
    let (reader, writer) = std::io::pipe().map_err(failed)?;
    let writer = pipe::Sender::from_owned_fd(writer.into()).map_err(failed)?;
    let importing = node.storage(move |mut client| {
        client.import_image(&image_id, &disk_format, IMAGE_BYTES_MAX, reader)
    });
    let (imported, sent) = tokio::join!(importing, send(body, writer));
    let info = imported.map_err(cloud_error)?;
    match sent {
        Ok(()) => Ok(info),
        Err(error) => {
            // To storage, an upload that breaks off looks like one that ended.
            forget(node, info.sha512).await;
            Err(CloudError::Invalid(format!("the upload broke off: {error}")))
        }
    }
}

/// Writes the body into the pipe and closes it. A reader that went away has said why.
async fn send(mut body: BodyStream, mut writer: pipe::Sender) -> std::io::Result<()> {
    while let Some(piece) = body.next().await {
        if let Err(error) = writer.write_all(&piece?).await {
            return match error.kind() {
                std::io::ErrorKind::BrokenPipe => Ok(()),
                _ => Err(error),
            };
        }
    }
    Ok(())
}

/// Removes content that no image of the catalog has.
async fn forget(node: &Node, sha512: String) {
    let known = |state: &State| {
        let mut contents = state.image.images.values().filter_map(|image| image.content.as_ref());
        contents.any(|content| content.sha512 == sha512)
    };
    let Ok(raft) = node.raft() else { return };
    if raft.read().await.is_ok_and(|state| !known(&state)) {
        let _ = node.storage(move |mut client| client.delete_image(&sha512)).await;
    }
}

/// An image's content, fetched from another host first where this one lacks it.
pub(super) async fn download(node: &Node, image: &Image) -> Result<BodyStream, CloudError> {
    let content = image.content.clone();
    let content = content
        .ok_or_else(|| CloudError::NotFound(format!("image {} has no content", image.id)))?;
    let sources = {
        let raft = node.raft().map_err(|error| CloudError::Unavailable(error.to_string()))?;
        sources(&raft.view(), image, node.host())
    };
    let disk = node.storage(move |mut client| {
        if !client.has_image(&content.sha512)? {
            client.fetch_image(&content.sha512, content.size_bytes, sources)?;
        }
        client.read_image(&content.sha512)
    });
    let file = std::fs::File::from(disk.await.map_err(cloud_error)?.descriptor);
    Ok(Box::pin(tokio_util::io::ReaderStream::with_capacity(
        tokio::fs::File::from_std(file),
        256 << 10,
    )))
}

fn sources(state: &State, image: &Image, except: HostId) -> Vec<Peer> {
    let holders = image.hosts.iter().filter(|holder| **holder != except);
    holders.filter_map(|holder| peer(state, *holder)).collect()
}

fn peer(state: &State, host: HostId) -> Option<Peer> {
    let addresses = &state.cluster.hosts.get(&host)?.addresses;
    Some(Peer { address: addresses.storage, server_name: addresses.server_name.clone() })
}

/// Storage's refusals in the API's words.
fn cloud_error(error: storage::Error) -> CloudError {
    use storage::ErrorKind;
    let message = error.message;
    match error.kind {
        ErrorKind::NotFound => CloudError::NotFound(message),
        ErrorKind::Exists | ErrorKind::InUse | ErrorKind::Stale => CloudError::Conflict(message),
        ErrorKind::NoSpace => CloudError::NoSpace(message),
        ErrorKind::Invalid => CloudError::Invalid(message),
        ErrorKind::Unreachable => CloudError::Unavailable(message),
        ErrorKind::Io | ErrorKind::HashMismatch => CloudError::Failed(message),
    }
}
