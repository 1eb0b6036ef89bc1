//! Growing mounted file systems to the size of their device.

use std::fs::File;
use std::io;

use rustix::ioctl::{Getter, Opcode, Setter, ioctl, opcode};

const XFS_GEOMETRY: Opcode = opcode::read::<XfsGeometry>(b'X', 100);
const XFS_GROW: Opcode = opcode::write::<XfsGrow>(b'X', 110);

/// `struct xfs_fsop_geom_v1`.
#[repr(C)]
struct XfsGeometry {
    block_bytes: u32,
    rt_extent_blocks: u32,
    ag_blocks: u32,
    ag_count: u32,
    log_blocks: u32,
    sector_bytes: u32,
    inode_bytes: u32,
    inode_max_percent: u32,
    data_blocks: u64,
    rt_blocks: u64,
    rt_extents: u64,
    log_start: u64,
    uuid: [u8; 16],
    stripe_unit: u32,
    stripe_width: u32,
    version: i32,
    flags: u32,
    log_sector_bytes: u32,
    rt_sector_bytes: u32,
    dir_block_bytes: u32,
}

/// `struct xfs_growfs_data`.
#[repr(C)]
struct XfsGrow {
    new_blocks: u64,
    inode_max_percent: u32,
}

/// Grows an ext4 to as many bytes as fit.
pub(crate) fn ext4(top: &File, device_bytes: u64) -> io::Result<()> {
    let block_bytes = rustix::fs::fstatvfs(top)?.f_bsize.max(1);
    Ok(rustix::fs::ext4_ioc_resize_fs(top, device_bytes / block_bytes)?)
}

/// Grows an XFS to as many bytes as fit. Does nothing when it has as many blocks already.
pub(crate) fn xfs(top: &File, device_bytes: u64) -> io::Result<()> {
    // SAFETY: the opcode writes this structure, which is plain numbers.
    let geometry = unsafe { ioctl(top, Getter::<XFS_GEOMETRY, XfsGeometry>::new()) }?;
    let new_blocks = device_bytes / u64::from(geometry.block_bytes.max(1));
    if new_blocks <= geometry.data_blocks {
        return Ok(());
    }
    let grow = XfsGrow { new_blocks, inode_max_percent: geometry.inode_max_percent };
    // SAFETY: the opcode takes this structure.
    Ok(unsafe { ioctl(top, Setter::<XFS_GROW, XfsGrow>::new(grow)) }?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_kernels_size() {
        assert_eq!((size_of::<XfsGeometry>(), size_of::<XfsGrow>()), (112, 16));
    }
}
