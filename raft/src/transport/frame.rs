//! Frames on a connection: length u32, request id u64, kind u8, body.

use std::io;

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::mpsc,
};

use super::Kind;

/// The largest frame, header included.
pub(crate) const FRAME_BYTES_MAX: usize = 64 << 20;
/// Request id and kind.
const HEADER_BYTES: usize = 9;
/// Frames written together.
const COALESCED_FRAMES_MAX: usize = 64;
/// A write buffer larger than this is given back.
const WRITE_BUFFER_KEPT_BYTES: usize = 1 << 20;
/// Frames that wait to be written to one connection.
pub(crate) const OUTGOING_FRAMES_MAX: usize = 256;

/// One message.
#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) request: u64,
    pub(crate) kind: Kind,
    pub(crate) body: Vec<u8>,
}

/// Reads the next frame; `None` when the peer closed between frames.
pub(crate) async fn read<R: AsyncRead + Unpin>(reader: &mut R) -> io::Result<Option<Frame>> {
    let length = match reader.read_u32_le().await {
        Ok(length) => length as usize,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    if !(HEADER_BYTES..=FRAME_BYTES_MAX).contains(&length) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a frame of {length} bytes"),
        ));
    }
    let request = reader.read_u64_le().await?;
    let kind = reader.read_u8().await?;
    let kind = Kind::from_byte(kind).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, format!("a frame of unknown kind {kind}"))
    })?;
    let mut body = vec![0; length - HEADER_BYTES];
    reader.read_exact(&mut body).await?;
    Ok(Some(Frame { request, kind, body }))
}

/// Appends a frame to a buffer.
pub(crate) fn encode(frame: &Frame, buffer: &mut Vec<u8>) {
    let length = (HEADER_BYTES + frame.body.len()) as u32;
    buffer.extend_from_slice(&length.to_le_bytes());
    buffer.extend_from_slice(&frame.request.to_le_bytes());
    buffer.push(frame.kind as u8);
    buffer.extend_from_slice(&frame.body);
}

/// Writes frames until the channel or the connection closes; what waits together leaves together.
pub(crate) async fn write_all<W: AsyncWrite + Unpin>(
    mut writer: W,
    mut frames: mpsc::Receiver<Frame>,
) -> io::Result<()> {
    let mut waiting = Vec::with_capacity(COALESCED_FRAMES_MAX);
    let mut buffer = Vec::new();
    while frames.recv_many(&mut waiting, COALESCED_FRAMES_MAX).await > 0 {
        for frame in waiting.drain(..) {
            encode(&frame, &mut buffer);
        }
        writer.write_all(&buffer).await?;
        writer.flush().await?;
        buffer.clear();
        buffer.shrink_to(WRITE_BUFFER_KEPT_BYTES);
    }
    writer.shutdown().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_frame_comes_back_as_it_was_and_a_hostile_length_is_refused() {
        let frame = Frame { request: 7, kind: Kind::Call, body: b"body".to_vec() };
        let mut bytes = Vec::new();
        encode(&frame, &mut bytes);
        assert_eq!(bytes[..13], [13, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 19]);
        let read_back = read(&mut bytes.as_slice()).await.expect("read").expect("there");
        assert_eq!((read_back.request, read_back.kind), (7, Kind::Call));
        assert_eq!(read_back.body, b"body");

        for hostile in
            [&[0, 0, 0, 0][..], &[255, 255, 255, 255], &[9, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 77]]
        {
            assert!(read(&mut &hostile[..]).await.is_err());
        }
        assert!(read(&mut &b""[..]).await.expect("closed").is_none());
    }
}
