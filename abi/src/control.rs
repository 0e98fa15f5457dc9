//! Framed messages with descriptors over a Unix stream socket: how node, spawner, VMM, switch and
//! storage talk on one host.
//!
//! A frame is a little-endian `u32` length and that many bytes (JSON by convention: requests are
//! typed and versioned by their owners). Descriptors travel with the frame's first byte. One
//! request is answered by one reply, in order.

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;

/// Longest frame accepted, bytes.
pub const FRAME_BYTES_MAX: usize = 64 << 20;
/// Most descriptors one frame carries.
pub const DESCRIPTORS_MAX: usize = 64;

/// Sends one frame, blocking until all of it is written.
pub fn send(socket: impl AsFd, message: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    if message.len() > FRAME_BYTES_MAX || descriptors.len() > DESCRIPTORS_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "control frame of {} bytes and {} descriptors is over the limit",
                message.len(),
                descriptors.len()
            ),
        ));
    }
    let length = (message.len() as u32).to_le_bytes();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        let fits = ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
        debug_assert!(fits, "space was reserved for DESCRIPTORS_MAX");
    }
    let slices = [IoSlice::new(&length), IoSlice::new(message)];
    let mut sent = retry(|| sendmsg(&socket, &slices, &mut ancillary, SendFlags::NOSIGNAL))?;
    while sent < 4 + message.len() {
        let rest: &[u8] = if sent < 4 { &length[sent..] } else { &message[sent - 4..] };
        sent += retry(|| rustix::net::send(&socket, rest, SendFlags::NOSIGNAL))?;
    }
    Ok(())
}

/// Receives one frame; `None` where the peer closed between frames.
pub fn receive(socket: impl AsFd) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    receive_at_most(socket, FRAME_BYTES_MAX)
}

/// As [`receive`], from a peer whose frames have at most `bytes_max` bytes.
pub fn receive_at_most(
    socket: impl AsFd,
    bytes_max: usize,
) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let mut descriptors = Vec::new();
    let mut length = [0u8; 4];
    let mut filled = 0;
    while filled < 4 {
        let read = receive_some(&socket, &mut length[filled..], &mut descriptors)?;
        if read == 0 {
            return if filled == 0 { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
        }
        filled += read;
    }
    let length = u32::from_le_bytes(length) as usize;
    if length > bytes_max {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("control frame of {length} bytes; at most {bytes_max} are taken"),
        ));
    }
    let mut message = vec![0u8; length];
    let mut filled = 0;
    while filled < length {
        let read = receive_some(&socket, &mut message[filled..], &mut descriptors)?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        filled += read;
    }
    Ok(Some((message, descriptors)))
}

fn receive_some(
    socket: impl AsFd,
    buffer: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = retry(|| {
        recvmsg(&socket, &mut [IoSliceMut::new(buffer)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)
    })?;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            descriptors.extend(received);
        }
    }
    // A frame may come in many pieces, each with descriptors.
    if descriptors.len() > DESCRIPTORS_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!(
                "control frame with {} descriptors; at most {DESCRIPTORS_MAX} are taken",
                descriptors.len()
            ),
        ));
    }
    Ok(received.bytes)
}

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => continue,
            result => return Ok(result?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_large_frame_arrives_whole_with_its_descriptors() {
        let (a, b) = UnixStream::pair().unwrap();
        let message: Vec<u8> = (0..1_000_000u32).map(|n| n as u8).collect();
        let expected = message.clone();
        let sender = std::thread::spawn(move || {
            let descriptor = std::fs::File::open("/dev/null").unwrap();
            send(&a, &message, &[descriptor.as_fd(), descriptor.as_fd()]).unwrap();
            send(&a, b"", &[]).unwrap();
        });
        let (received, descriptors) = receive(&b).unwrap().unwrap();
        assert!(received == expected);
        assert_eq!(descriptors.len(), 2);
        assert_eq!(receive(&b).unwrap().unwrap().0, b"");
        sender.join().unwrap();
        assert!(receive(&b).unwrap().is_none());
    }

    #[test]
    fn an_oversized_frame_is_refused_before_it_is_allocated() {
        let (a, b) = UnixStream::pair().unwrap();
        rustix::net::send(&a, &u32::MAX.to_le_bytes(), SendFlags::empty()).unwrap();
        assert_eq!(receive(&b).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn descriptors_that_come_in_pieces_are_counted_together() {
        let (a, b) = UnixStream::pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        let many = [file.as_fd(); DESCRIPTORS_MAX];
        for byte in 8u32.to_le_bytes() {
            let mut space =
                [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(&many)));
            sendmsg(&a, &[IoSlice::new(&[byte])], &mut ancillary, SendFlags::empty()).unwrap();
        }
        assert_eq!(receive(&b).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
