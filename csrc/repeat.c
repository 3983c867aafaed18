/* repeat.c - header blocks that come again.
 *
 * A client repeats its header fields, whatever it asks for: what was parsed from a block
 * is kept with its bytes, and where the same bytes follow a request line, one comparison
 * stands for parsing them. What a block says depends on nothing but itself, the version
 * (is a connection kept?) and an authority in the target (which is then the Host; such
 * blocks are not kept). Slices count from the block's start, so it may come at another
 * offset.
 */
#include "internal.h"

/* Flags that the request line sets, not the block. */
enum { OF_REQUEST_LINE = PF_HEAD_IS_GET | PF_HEAD_IS_HEAD };

uint32_t
pf__repeat_find(const pf__repeat *known, pf_head *head, const char *data, size_t at,
                size_t len)
{
    size_t size = known->size;
    if (size == 0 || at > len || size > len - at || known->minor != head->minor
        || head->authority.len > 0 || memcmp(data + at, known->bytes, size) != 0)
        return 0;
    for (uint16_t i = 0; i < known->nfields; i++) {
        head->fields[i] = known->fields[i];
        head->fields[i].name_at += (uint32_t)at;
        head->fields[i].value_at += (uint32_t)at;
    }
    head->nfields = known->nfields;
    head->host = known->host;
    head->flags |= known->flags;
    head->content_length = known->content_length;
    return known->size;
}

void
pf__repeat_keep(pf__repeat *known, const pf_head *head, const char *data, size_t at)
{
    size_t size = head->size - at;
    if (size > PF__REPEAT_BYTES || head->nfields > PF__REPEAT_FIELDS
        || head->authority.len > 0)
        return;
    memcpy(known->bytes, data + at, size);
    for (uint16_t i = 0; i < head->nfields; i++) {
        known->fields[i] = head->fields[i];
        known->fields[i].name_at -= (uint32_t)at;
        known->fields[i].value_at -= (uint32_t)at;
    }
    known->size = (uint16_t)size;
    known->nfields = head->nfields;
    known->host = head->host;
    known->minor = head->minor;
    known->flags = head->flags & (uint8_t)~OF_REQUEST_LINE;
    known->content_length = head->content_length;
}
