package vfio

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"strings"
)

// Token is a secret that the user of a PF shares with the users of its VFs, while all of them use VFIO. It is a UUID,
// in the order of bytes in which it is written.
type Token [16]byte

// NewToken makes a random token.
func NewToken() Token {
	var t Token
	_, _ = rand.Read(t[:]) // which never fails
	t[6], t[8] = t[6]&0x0f|0x40, t[8]&0x3f|0x80
	return t
}

// ParseToken reads a token as 8ce5d3a6-3e0c-4b0c-9d2e-5f1a7c1b2d3e.
func ParseToken(s string) (Token, error) {
	var t Token
	raw, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if err == nil && len(raw) == len(t) {
		copy(t[:], raw)
		if strings.EqualFold(t.String(), s) {
			return t, nil
		}
	}
	return Token{}, fmt.Errorf("vfio: invalid UUID %q (want e.g. 8ce5d3a6-3e0c-4b0c-9d2e-5f1a7c1b2d3e)", s)
}

// String is the UUID.
func (t Token) String() string {
	h := hex.EncodeToString(t[:])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}
