//! Archives in the "newc" form of cpio, which Linux unpacks as its first file system, and the
//! unpacking of a kernel out of its `bzImage`.

use anyhow::{Context, Result, bail, ensure};

const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// An archive being written.
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// An archive with the directories and the console that every first program needs.
    pub(crate) fn new() -> Archive {
        let mut archive = Archive { bytes: Vec::new(), entries: 0 };
        for directory in ["bin", "dev", "modules", "guest", "etc"] {
            archive.entry(directory, DIRECTORY, (0, 0), &[]);
        }
        archive.entry("dev/console", CHARACTER_DEVICE, (5, 1), &[]);
        archive
    }

    /// Adds an executable file.
    pub(crate) fn file(&mut self, name: &str, content: &[u8]) {
        self.entry(name, EXECUTABLE, (0, 0), content);
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let fields = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            content.len() as u32,
            0,
            0,
            device.0,
            device.1,
            name.len() as u32 + 1,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// The whole archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }
}

/// The ELF that a `bzImage` carries compressed.
///
/// # Errors
/// Where the image is damaged or compressed in another way than Debian's cloud kernels are (LZ4).
pub(crate) fn unpack_kernel(bzimage: &[u8]) -> Result<Vec<u8>> {
    const LZ4_LEGACY: [u8; 4] = [0x02, 0x21, 0x4C, 0x18];
    let word = |at: usize| -> Result<usize> {
        let bytes = bzimage.get(at..at + 4).context("the kernel image ends early")?;
        Ok(u32::from_le_bytes(bytes.try_into()?) as usize)
    };
    let setup = (bzimage.get(0x1F1).copied().unwrap_or(4) as usize + 1) * 512;
    let start = setup + word(0x248)?;
    let payload = bzimage.get(start..start + word(0x24C)?).context("the payload is cut off")?;
    let Some(mut blocks) = payload.strip_prefix(&LZ4_LEGACY) else {
        bail!("the kernel is not compressed with LZ4: it begins with {:02x?}", &payload[..4]);
    };
    let mut kernel = Vec::new();
    // The size of the whole follows the last block.
    while let Some((size, rest)) = blocks.split_first_chunk::<4>() {
        let size = u32::from_le_bytes(*size) as usize;
        if rest.is_empty() {
            break;
        }
        let block = rest.get(..size).context("an LZ4 block is cut off")?;
        unpack_block(block, &mut kernel)?;
        blocks = &rest[size..];
    }
    ensure!(kernel.starts_with(b"\x7fELF"), "the unpacked kernel is no ELF");
    Ok(kernel)
}

/// One LZ4 block (lz4_Block_format.md), whose matches reach back within the block only.
fn unpack_block(block: &[u8], out: &mut Vec<u8>) -> Result<()> {
    let start = out.len();
    let mut rest = block;
    while let Some((&token, after)) = rest.split_first() {
        rest = after;
        let literals = length(token >> 4, &mut rest)?;
        out.extend_from_slice(rest.get(..literals).context("LZ4 literals are cut off")?);
        rest = &rest[literals..];
        let Some((offset, after)) = rest.split_first_chunk::<2>() else {
            // The last sequence has literals only.
            return Ok(());
        };
        rest = after;
        let offset = usize::from(u16::from_le_bytes(*offset));
        let matched = length(token & 15, &mut rest)? + 4;
        ensure!(offset > 0 && offset <= out.len() - start, "an LZ4 match reaches too far back");
        for _ in 0..matched {
            out.push(out[out.len() - offset]);
        }
    }
    Ok(())
}

fn length(short: u8, rest: &mut &[u8]) -> Result<usize> {
    let mut length = usize::from(short);
    if short == 15 {
        loop {
            let (&more, after) = rest.split_first().context("an LZ4 length is cut off")?;
            *rest = after;
            length += usize::from(more);
            if more != 255 {
                break;
            }
        }
    }
    Ok(length)
}
